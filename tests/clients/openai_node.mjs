// A program written for OpenAI's npm package. Usage: node openai_node.mjs URL KEY MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Name a city by the sea." }];
const options = { model, messages, max_tokens: 30, temperature: 1, seed: 11 };

const models = await client.models.list();
assert.deepEqual(models.data.map((each) => each.id), [model]);

const whole = await client.chat.completions.create(options);
let text = "";
let usage = null;
const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const parameters = {
  type: "object",
  properties: { city: { enum: ["Lisbon", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
const runner = client.chat.completions.stream({ ...options, max_tokens: 200, tools, tool_choice: "required" });
const called = await runner.finalChatCompletion();
const call = called.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "get_weather");
assert.ok(["Lisbon", "Oslo"].includes(JSON.parse(call.function.arguments).city));

const response = await client.responses.create({ model, input: "Name a city.", max_output_tokens: 20, temperature: 0 });
assert.ok(response.output_text.length > 0);

const embedding = await client.embeddings.create({ model, input: "the sea" });
assert.ok(embedding.data[0].embedding.length > 0);

await assert.rejects(client.chat.completions.create({ ...options, top_p: 9 }), OpenAI.BadRequestError);

const controller = new AbortController();
const aborted = await client.chat.completions.create(
  { ...options, max_tokens: 1000, ignore_eos: true, stream: true },
  { signal: controller.signal },
);
for await (const _ of aborted) {
  controller.abort();
  break;
}
console.log("all well");
