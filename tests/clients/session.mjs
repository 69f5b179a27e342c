// A session with pjwd by a client that shares no code with pjw: start, exec, attach, forward, logs, stop, get, and
// what is refused.
// Prints what it saw, a line of JSON for each step; the test that starts it (tests/root/test_node_client.py) judges.
//   node session.mjs proto SRC_DIRECTORY | node session.mjs reflection
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { readFileSync } from "node:fs";
import { loadByReflection } from "./reflection.mjs";

const { PJW_SERVER, PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY } = process.env;
const [way, source] = process.argv.slice(2);
// 64 bits do not fit into a number of JavaScript; descriptors, and so reflection, have the names of the .proto
const options = { longs: String, enums: String, keepCase: true };
const ca = readFileSync(PJW_CA_CRT);
const credentials = grpc.credentials.createSsl(ca, readFileSync(PJW_CLIENT_KEY), readFileSync(PJW_CLIENT_CRT));

const definition =
  way === "proto"
    ? loader.loadSync("pjw/v1/job_worker.proto", { ...options, includeDirs: [source] })
    : await loadByReflection(PJW_SERVER, credentials, "pjw.v1.JobWorkerService", options);
const { JobWorkerService } = grpc.loadPackageDefinition(definition).pjw.v1;

function tell(step, seen) {
  console.log(JSON.stringify({ step, ...seen }));
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + 60_000 }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function refused(step, client, method, request) {
  try {
    tell(step, { answer: await call(client, method, request) });
  } catch (error) {
    tell(step, { code: grpc.status[error.code], details: error.details, hint: error.metadata.get("pjw-hint") });
  }
}

// Follow to the end. The job ends when it is stopped, which happens once all bytes of `until` are there.
async function follow(client, id, until) {
  const chunks = [];
  let seen = 0;
  let stopped;
  for await (const { data } of client.logs({ id })) {
    chunks.push(data);
    seen += data.length;
    if (seen >= until && !stopped) stopped = call(client, "stop", { id });
  }
  return { output: Buffer.concat(chunks), stopped: (await stopped).job };
}

const client = new JobWorkerService(PJW_SERVER, credentials);

// Follow a session of a job to its end: what it wrote, and how it ended.
async function inJob(id, command, keys) {
  const { session } = await call(client, "exec", { id, command, input: keys !== undefined, terminal: { rows: 33, columns: 101 } });
  await call(client, "resize", { id, session: session.number, terminal: { rows: 44, columns: 102 } });
  const writer = client.writeInput(() => {});
  writer.on("data", () => {});
  writer.on("error", () => {});
  writer.write({ id, session: session.number, data: Buffer.from(keys) });
  const chunks = [];
  for await (const { data } of client.logs({ id, session: session.number })) chunks.push(data);
  writer.cancel();
  const ended = await call(client, "wait", { id, session: session.number });
  return { output: Buffer.concat(chunks).toString(), session: ended.session };
}

// What a session has written from a byte on: to its end, or until it has said something.
async function shown(at, offset, until) {
  const chunks = [];
  for await (const { data } of client.logs({ ...at, offset })) {
    chunks.push(data);
    if (until && Buffer.concat(chunks).includes(until)) break;
  }
  return Buffer.concat(chunks).toString();
}

// Type at the terminal of a session, see what it shows, and leave it; the server knows how much was typed before.
async function visit(at, keys, from, until) {
  const writer = client.writeInput();
  writer.on("error", () => {});
  writer.write(at);
  // a field that is 0 is not there
  const { offset = "0" } = await new Promise((resolve) => writer.once("data", resolve));
  writer.on("data", () => {});
  writer.write({ offset, data: Buffer.from(keys) });
  const output = await shown(at, from, until);
  writer.cancel();
  return { offset, output };
}

// A terminal that is left and come back to, with a window of another size.
async function attach(id) {
  const ready = "ready\r\n";
  const command = "stty -echo; echo ready; read a; echo got $a; read b; stty size; echo then $b; exit 4";
  const { session } = await call(client, "exec", { id, command, input: true, terminal: { rows: 33, columns: 101 } });
  const at = { id, session: session.number };
  // what is typed before that is shown
  await shown(at, 0, ready);
  const first = await visit(at, "one\r", ready.length, "got one\r\n");
  await call(client, "resize", { ...at, terminal: { rows: 44, columns: 102 } });
  const second = await visit(at, "two\r", ready.length + first.output.length);
  return { first, second, session: (await call(client, "wait", at)).session };
}

// Send data to a port of a job; what comes back, and what it is refused with where nobody listens.
function forward(id, port, data) {
  return new Promise((resolve) => {
    const connection = client.forward();
    const chunks = [];
    // the first answer, and that of the end, have none
    connection.on("data", ({ data }) => data && chunks.push(data));
    connection.on("error", (error) => resolve({ code: grpc.status[error.code], details: error.details }));
    connection.on("end", () => resolve({ output: Buffer.concat(chunks).toString() }));
    connection.write({ id, port });
    connection.write({ data: Buffer.from(data), end: true });
    connection.end();
  });
}

// a program that listens, and answers in capitals
const listens = `
import socket
with socket.create_server(("127.0.0.1", 8080)) as server:
    print("listens", flush=True)
    with server.accept()[0] as connection:
        connection.sendall(connection.recv(100).upper())
`;

// every value of a byte, and then nothing until it is stopped
const octal = Array.from({ length: 256 }, (_, value) => `\\${value.toString(8).padStart(3, "0")}`).join("");
const { job: started } = await call(client, "start", { argv: { arguments: ["sh", "-c", `printf '${octal}'; sleep 300`] } });
tell("start", { job: started });
tell("exec", await inJob(started.id, "read line; stty size; echo got $line; exit 3", "words\r"));
await refused("exec of what is not there", client, "exec", { id: started.id, argv: { arguments: ["/no/such"] } });
tell("attach", await attach(started.id));
const { session: server } = await call(client, "exec", {
  id: started.id,
  argv: { arguments: ["/usr/bin/python3", "-I", "-S", "-c", listens] },
});
await shown({ id: started.id, session: server.number }, 0, "listens");
tell("forward", await forward(started.id, 8080, "words"));
tell("forward to nobody", await forward(started.id, 8081, "words"));
await refused("delete of what runs", client, "delete", { id: started.id });

const { output, stopped } = await follow(client, started.id, 256);
tell("logs", { hex: output.toString("hex") });
tell("stop", { job: stopped });
tell("get", await call(client, "get", { id: started.id }));

// a job that waits: it has no start, and its end without one no exit code
const { jobs: [held] } = await call(client, "submit", { jobs: [{ start: { command: "true" }, priority: 7, held: true }] });
tell("submit", { job: held });
tell("hold", await call(client, "hold", { id: held.id }));
tell("stop in the queue", await call(client, "stop", { id: held.id }));
await refused("release of what has ended", client, "release", { id: held.id });

// what has become of it, and the same from the middle on
async function changes(since) {
  const found = [];
  for await (const answer of client.watchJobs({ since, ids: [held.id], no_follow: true })) found.push(...(answer.changes ?? []));
  return found;
}
const all = await changes(0);
tell("changes", { all, rest: await changes(all[0].sequence) });
await refused("get of none", client, "get", { id: "9007199254740993" });
await refused("start of nothing", client, "start", { command: "" });
await refused("start of what is not there", client, "start", { argv: { arguments: ["/no/such"] } });
client.close();

const nobody = new JobWorkerService(PJW_SERVER, grpc.credentials.createSsl(ca));
await refused("without a certificate", nobody, "get", { id: started.id });
nobody.close();
