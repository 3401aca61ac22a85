// The same operations in Node.js, as its users would write them: Fastify, node-postgres, @fastify/jwt.
// Statements and columns are those of floor.py. Every token is verified anew, which is the plug-in's default.

import jwt from "@fastify/jwt";
import fastify from "fastify";
import pg from "pg";

const FIELDS = "title, description, completed, priority, category, tags, due_date, due_time, recurring, reminder";
const COLUMNS = `id, user_id, ${FIELDS}, completed_at, version, created_at, updated_at`;
const PRIORITIES = [null, "high", "medium", "low"];
const GET = `SELECT ${COLUMNS} FROM task WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL`;
const LIST =
  `SELECT ${COLUMNS}, list_revision FROM ` +
  "(SELECT coalesce((SELECT revision FROM task_owner WHERE user_id = $1), 0) AS list_revision) AS head " +
  `LEFT JOIN (SELECT ${COLUMNS} FROM task WHERE user_id = $1 AND deleted_at IS NULL ` +
  "ORDER BY created_at DESC, id DESC LIMIT $2) AS page ON true ORDER BY created_at DESC, id DESC";
const POST =
  "WITH following AS (INSERT INTO task_owner (user_id, revision, task_count) VALUES ($1, 1, 1) " +
  "ON CONFLICT (user_id) DO UPDATE SET revision = task_owner.revision + 1, " +
  "task_count = task_owner.task_count + 1 RETURNING revision) " +
  `INSERT INTO task (user_id, ${FIELDS}, version, created_at, updated_at, revision) ` +
  "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 1, $12, $12, (SELECT revision FROM following)) " +
  `RETURNING ${COLUMNS}`;
const TOGGLE =
  "WITH locked AS (SELECT revision FROM task_owner WHERE user_id = $1 FOR NO KEY UPDATE), " +
  "changed AS (UPDATE task SET completed = NOT completed, " +
  "completed_at = CASE WHEN completed THEN NULL ELSE $3::timestamptz END, " +
  "version = version + 1, updated_at = $3, revision = locked.revision + 1 FROM locked " +
  "WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL " +
  "AND (completed OR recurring IS NULL OR due_date IS NULL) RETURNING task.*), " +
  "counted AS (UPDATE task_owner SET revision = changed.revision FROM changed " +
  "WHERE task_owner.user_id = changed.user_id) " +
  `SELECT ${COLUMNS} FROM changed`;

const text = { type: "string" };
const optional = { type: ["string", "null"] };
const TASK = {
  type: "object",
  properties: {
    id: { type: "integer" },
    user_id: text,
    title: text,
    description: optional,
    completed: { type: "boolean" },
    priority: optional,
    category: optional,
    tags: { type: "array", items: text },
    due_date: optional,
    due_time: optional,
    recurring: optional,
    reminder: { type: "boolean" },
    completed_at: optional,
    version: { type: "integer" },
    created_at: text,
    updated_at: text,
  },
};
const BODY = {
  type: "object",
  required: ["title"],
  properties: {
    title: { type: "string", minLength: 1, maxLength: 200 },
    description: { type: ["string", "null"], maxLength: 1000 },
    priority: { enum: [...PRIORITIES] },
    category: { type: ["string", "null"], maxLength: 50 },
    tags: { type: "array", items: text, default: [] },
    due_date: { type: ["string", "null"], format: "date" },
    due_time: optional,
    recurring: optional,
    reminder: { type: "boolean", default: false },
  },
};

// By default a bigint is a string, and dates and times lose their microseconds.
const { builtins } = pg.types;
pg.types.setTypeParser(builtins.INT8, Number);
pg.types.setTypeParser(builtins.DATE, (value) => value);
pg.types.setTypeParser(builtins.TIMESTAMPTZ, (value) => value.replace(" ", "T").replace("+00", "Z"));
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 10, options: "-c TimeZone=UTC" });

async function query(name, statement, values) {
  const { rows } = await pool.query({ name, text: statement, values }); // prepared once a connection, by its name
  for (const row of rows) row.priority = PRIORITIES[row.priority ?? 0];
  return rows;
}

const app = fastify();
app.register(jwt, {
  secret: process.env.BETTER_AUTH_SECRET,
  verify: { algorithms: ["HS256"], requiredClaims: ["sub", "exp"] },
});

app.get("/health", () => ({ status: "ok" }));

app.register(async (tasks) => {
  tasks.addHook("onRequest", async (request, reply) => {
    await request.jwtVerify();
    if (request.user.sub !== request.params.user) return reply.code(403).send({ detail: "Forbidden" });
  });
  const one = { response: { "2xx": TASK } };

  tasks.get(
    "/",
    {
      schema: {
        querystring: { type: "object", properties: { limit: { type: "integer", default: 200 } } },
        response: { 200: { type: "array", items: TASK } },
      },
    },
    async ({ params, query: { limit } }) => (await query("list", LIST, [params.user, limit + 1])).slice(0, limit),
  );
  tasks.get("/:id", { schema: one }, async ({ params }) => (await query("get", GET, [params.user, params.id]))[0]);
  tasks.post("/", { schema: { body: BODY, ...one } }, async ({ params, body }, reply) => {
    const priority = body.priority ? PRIORITIES.indexOf(body.priority) : null;
    const values = [body.title.trim(), body.description, false, priority, body.category, body.tags];
    values.push(body.due_date, body.due_time, body.recurring, body.reminder, new Date());
    reply.code(201);
    return (await query("post", POST, [params.user, ...values]))[0];
  });
  tasks.patch(
    "/:id/complete",
    { schema: one },
    async ({ params }) => (await query("toggle", TOGGLE, [params.user, params.id, new Date()]))[0],
  );
}, { prefix: "/api/:user/tasks" });

await app.listen({ host: "127.0.0.1", port: Number(process.env.PORT) });
