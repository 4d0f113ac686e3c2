// node orchestrate.mjs PACKAGE MODE URL KEY
//
// Connects a TypeScript MCP client over Streamable HTTP, lists the tools, calls `orchestrate` once well and once badly,
// and prints what it got as one JSON object. PACKAGE is a dependency of package.json; MODE is how version 2 of the SDK
// negotiates: legacy, auto, or the version to insist on (version 1 knows only its handshake: "legacy").

const [packageName, mode, url, key] = process.argv.slice(2);

async function load() {
  if (packageName === "@modelcontextprotocol/client") {
    return await import(packageName);
  }
  const { Client } = await import(`${packageName}/client/index.js`);
  const { StreamableHTTPClientTransport } = await import(`${packageName}/client/streamableHttp.js`);
  return { Client, StreamableHTTPClientTransport };
}

const { Client, StreamableHTTPClientTransport } = await load();
const transport = new StreamableHTTPClientTransport(new URL(url), {
  requestInit: {
    headers: {
      Authorization: `Bearer ${key}`,
      "X-Poke-User-Id": "user-1",
      "X-Poke-Callback-Url": "https://poke.example/cb",
      "X-Poke-Callback-Token": "token-1",
    },
  },
});
const negotiation = mode === "legacy" || mode === "auto" ? mode : { pin: mode };
const client = new Client(
  { name: "pokestrator-acceptance", version: "1.0.0" },
  { versionNegotiation: { mode: negotiation } },
);

try {
  await client.connect(transport);
} catch (error) {
  console.log(JSON.stringify({ refused: String(error) }));
  process.exit(0);
}
const { tools } = await client.listTools();
const task = { task_description: "Write a limerick about zebra stripes", metadata: { zone: "Europe/Madrid" } };
const good = await client.callTool({ name: "orchestrate", arguments: task });
const bad = await client.callTool({ name: "orchestrate", arguments: { task_description: " " } });
console.log(
  JSON.stringify({
    version: client.getNegotiatedProtocolVersion?.() ?? transport.protocolVersion,
    instructions: client.getInstructions(),
    server: client.getServerVersion(),
    tools,
    good,
    bad,
  }),
);
await client.close();
