-- What wrk sends: one operation, by users in turn, each with their own token.
-- Arguments: operation, file of tokens (one a line), tasks per user; for "path" the path, asked for by user 1;
-- for "known" a file of entity tags in the users' order, where an empty line means that the server sends none;
-- for "varied", any operation at random, a file of queries of lists. A fifth argument is the distance from one
-- user's number to the next one's.

local operation, tokens, lines, per_user, spread, fixed = nil, {}, {}, 0, 1, nil
local mixed = { "one", "list200", "query", "query", "create", "complete" }
local methods = { create = "POST", complete = "PATCH" }
local queries = { list = "?limit=20", list200 = "?limit=200", known = "?limit=20" }

function init(args)
  operation, per_user, spread = args[1], tonumber(args[3]), tonumber(args[5] or 1)
  for line in io.lines(args[2]) do tokens[#tokens + 1] = line end
  if operation == "path" then fixed = args[4] end
  if operation == "known" or operation == "varied" then
    for line in io.lines(args[4]) do lines[#lines + 1] = line end
  end
  if operation == "known" then
    local expected = lines[1] == "" and 200 or 304
    function response(status) assert(status == expected, status) end -- an error here ends wrk
  end
  math.randomseed(os.time())
end

function request()
  local kind = operation == "varied" and mixed[math.random(#mixed)] or operation
  local user = fixed and 1 or math.random(#tokens)
  local headers = { ["Authorization"] = "Bearer " .. tokens[user] }
  local number = (user - 1) * spread + 1
  local path, body = string.format("/api/user%04d/tasks", number), nil
  if fixed then
    path = fixed
  elseif kind == "query" then
    path = path .. "?" .. lines[math.random(#lines)]
  elseif queries[kind] then
    path = path .. queries[kind]
    if kind == "known" and lines[user] ~= "" then headers["If-None-Match"] = lines[user] end
  elseif kind == "create" then
    headers["Content-Type"] = "application/json"
    body = '{"title": "Buy milk", "description": "Two bottles of it"}'
  else
    path = path .. "/" .. ((number - 1) * per_user + math.random(per_user))
    if kind == "complete" then path = path .. "/complete" end
  end
  return wrk.format(methods[kind] or "GET", path, headers, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
