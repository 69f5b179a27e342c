// What a server says of its services by reflection, as @grpc/proto-loader takes it: for clients without the .proto.
// `options` are those of the loader, with keepCase: that is how descriptors have their names.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { fileURLToPath } from "node:url";

const REFLECTION = fileURLToPath(new URL("reflection.proto", import.meta.url));

// A FileDescriptorSet is `repeated FileDescriptorProto file = 1`: each with its tag and its length.
function descriptorSet(files) {
  const parts = [];
  for (const file of files) {
    const head = [0x0a];
    let length = file.length;
    for (; length > 0x7f; length >>>= 7) head.push((length & 0x7f) | 0x80);
    parts.push(Buffer.from([...head, length]), file);
  }
  return Buffer.concat(parts);
}

// Load the package of a service with its dependencies, which the server sends along.
export function loadByReflection(server, credentials, symbol, options) {
  const { ServerReflection } = grpc.loadPackageDefinition(loader.loadSync(REFLECTION, options)).grpc.reflection.v1alpha;
  const client = new ServerReflection(server, credentials);
  return new Promise((resolve, reject) => {
    const call = client.ServerReflectionInfo();
    call.on("error", reject);
    call.on("data", (answer) => {
      call.end();
      const found = answer.file_descriptor_response;
      if (found) resolve(loader.loadFileDescriptorSetFromBuffer(descriptorSet(found.file_descriptor_proto), options));
      else reject(new Error(answer.error_response.error_message));
    });
    call.write({ file_containing_symbol: symbol });
  }).finally(() => client.close());
}
