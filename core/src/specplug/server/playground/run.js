// Talks to the server. Paths are relative, so that the page works behind a proxy that adds a prefix.

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refuse(response) {
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's answer, which is not ours to read
  }
  throw new ServerError(response.status, message);
}

export async function info(key) {
  const response = await fetch("v1/specplug/info", { headers: headers(key) });
  if (!response.ok) await refuse(response);
  return response.json();
}

// Sends a request and calls `receive` with each event of its trace. Aborting the signal aborts the request.
export async function trace(body, key, signal, receive) {
  const response = await fetch("v1/specplug/trace", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) receive(JSON.parse(event.slice("data: ".length)));
  }
}
