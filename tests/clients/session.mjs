// A session with pjwd by a client that shares no code with pjw: start, logs, stop, get, and what is refused.
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

// every value of a byte, and then nothing until it is stopped
const octal = Array.from({ length: 256 }, (_, value) => `\\${value.toString(8).padStart(3, "0")}`).join("");
const { job: started } = await call(client, "start", { argv: { arguments: ["sh", "-c", `printf '${octal}'; sleep 300`] } });
tell("start", { job: started });
await refused("delete of what runs", client, "delete", { id: started.id });

const { output, stopped } = await follow(client, started.id, 256);
tell("logs", { hex: output.toString("hex") });
tell("stop", { job: stopped });
tell("get", await call(client, "get", { id: started.id }));

await refused("get of none", client, "get", { id: "9007199254740993" });
await refused("start of nothing", client, "start", { command: "" });
await refused("start of what is not there", client, "start", { argv: { arguments: ["/no/such"] } });
client.close();

const nobody = new JobWorkerService(PJW_SERVER, grpc.credentials.createSsl(ca));
await refused("without a certificate", nobody, "get", { id: started.id });
nobody.close();
