// Better Auth as a front end runs it: its own migrations, then its handler over HTTP.
// `tests/better_auth.py` starts it and gives the settings in the environment.
import { createServer } from "node:http";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { bearer, jwt } from "better-auth/plugins";
import pg from "pg";

const { DATABASE_URL, PORT, BASE_URL, BETTER_AUTH_SECRET, JWT_ALGORITHM, ID_KIND, COOKIE_CACHE } = process.env;

const options = {
  baseURL: BASE_URL,
  secret: BETTER_AUTH_SECRET,
  database: new pg.Pool({ connectionString: DATABASE_URL }),
  telemetry: { enabled: false },
  emailAndPassword: { enabled: true },
  emailVerification: {
    sendOnSignUp: true,
    // Standard output is the mailbox.
    sendVerificationEmail: async ({ user, token }) => console.log(JSON.stringify({ to: user.email, token })),
  },
  // Text is what Better Auth makes when it is told nothing.
  advanced: ID_KIND === "text" ? {} : { database: { generateId: ID_KIND } },
  // "secret": signed with the shared secret; "keys": with the key of the tokens.
  session: COOKIE_CACHE === "off" ? {} : { cookieCache: { enabled: true, strategy: "jwt" } },
  plugins: [
    jwt({ jwks: { keyPairConfig: { alg: JWT_ALGORITHM } }, sessionCookieCache: COOKIE_CACHE === "keys" }),
    bearer(),
  ],
};

const { runMigrations } = await getMigrations(options);
await runMigrations();
createServer(toNodeHandler(betterAuth(options))).listen(Number(PORT), "127.0.0.1");

// Whoever started this holds its standard input: it ends with them, even when they are killed.
process.stdin.on("end", () => process.exit()).resume();
