-- What wrk sends: one operation, by users in turn, each with their own token.
-- Arguments: operation, file of tokens (one a line), tasks per user; for "path" the path, asked for by user 1.

local operation, tokens, per_user, fixed = nil, {}, 0, nil
local methods = { one = "GET", list = "GET", create = "POST", complete = "PATCH", path = "GET" }

function init(args)
  operation, per_user, fixed = args[1], tonumber(args[3]), args[4]
  for line in io.lines(args[2]) do tokens[#tokens + 1] = line end
  math.randomseed(os.time())
end

function request()
  local user = fixed and 1 or math.random(#tokens)
  local headers = { ["Authorization"] = "Bearer " .. tokens[user] }
  local path, body = string.format("/api/user%04d/tasks", user), nil
  if fixed then
    path = fixed
  elseif operation == "list" then
    path = path .. "?limit=20"
  elseif operation == "create" then
    headers["Content-Type"] = "application/json"
    body = '{"title": "Buy milk", "description": "Two bottles of it"}'
  else
    path = path .. "/" .. ((user - 1) * per_user + math.random(per_user))
    if operation == "complete" then path = path .. "/complete" end
  end
  return wrk.format(methods[operation], path, headers, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
