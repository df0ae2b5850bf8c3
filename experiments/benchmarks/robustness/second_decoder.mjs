// Decodes a bundle of .opq files; prints a line of JSON for each.
//
//   node second_decoder.mjs DECODER BUNDLE
//
// A bundle is any number of files, each after its length as u32.  A line has the processor seconds,
// and the digest of all that the file holds, or the error that refuses it.

import {createHash} from 'node:crypto';
import {readFileSync, writeSync} from 'node:fs';
import {pathToFileURL} from 'node:url';

const [decoder, bundle] = process.argv.slice(2);
const {openOpq} = await import(pathToFileURL(decoder));
const data = readFileSync(bundle);
for (let at = 0; at < data.length; ) {
  const size = data.readUInt32LE(at);
  const bytes = data.subarray(at + 4, at + 4 + size);
  at += 4 + size;
  const before = process.cpuUsage();
  const line = {};
  try {
    line.digest = digest(openOpq(bytes));
  } catch (error) {
    line.error = String(error.message);
    // the first one: of any other type than Error it is a fault of the decoder
    let first = error;
    while (first.cause) first = first.cause;
    line.type = first.constructor.name;
  }
  const {user, system} = process.cpuUsage(before);
  line.seconds = (user + system) / 1e6;
  // at once, so that a process that hangs has told of the files before
  writeSync(1, JSON.stringify(line) + '\n');
}

function digest(file) {
  const hash = createHash('sha256');
  const text = (string) => hash.update(`${string.length}:`).update(Buffer.from(string, 'utf16le'));
  const bytes = (array) => {
    hash.update(`${array.byteLength}:`);
    hash.update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
  };
  for (const key of Object.keys(file.metadata).sort()) {
    text(key);
    text(file.metadata[key]);
  }
  for (const name of file.names) {
    const {shape, dtype, values, codes} = file.leaf(name);
    text(name);
    text(`${dtype}[${shape}]`);
    bytes(values);
    if (codes) bytes(codes);
  }
  for (const [name, content] of file.readSideFiles()) {
    text(name);
    bytes(content);
  }
  return hash.digest('hex');
}
