// The page's side of a worker: calls that are promises. After an error the worker is of no more use and is ended.

export class Client {
  constructor(version) {
    this.calls = new Map();
    this.count = 0;
    this.ended = false;
    this.worker = new Worker(new URL(`worker.js${version}`, import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => this.end(event.message || "The page's worker could not be started.");
  }

  // Ask the worker; `onNote` hears what it says before it is done.
  async call(type, values = {}, onNote = null) {
    if (this.ended) throw new Error("The model was unloaded.");
    const id = (this.count += 1);
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject, onNote });
      this.worker.postMessage({ id, type, ...values });
    });
  }

  stop() {
    this.worker.postMessage({ type: "stop" });
  }

  // Terminate the worker: its memory comes back, and whatever still runs fails with `reason`.
  end(reason = "The model was unloaded.") {
    this.ended = true;
    this.worker.terminate();
    const error = new Error(reason);
    for (const { reject } of this.calls.values()) reject(error);
    this.calls.clear();
  }

  receive({ id, note, result, error }) {
    const call = this.calls.get(id);
    if (!call) return;
    if (note) {
      call.onNote?.(note);
    } else if (error) {
      this.end(error);
    } else {
      this.calls.delete(id);
      call.resolve(result);
    }
  }
}
