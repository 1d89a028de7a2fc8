// The page's side of a worker: calls that are promises. After an error the worker is of no more use and is ended, unless
// it says that only the input was wrong.

const version = new URL(import.meta.url).search;
const { makeWorker } = await import(`./source.js${version}`);

export class Client {
  constructor() {
    this.calls = new Map();
    this.count = 0;
    this.ended = null; // why, once it is
    this.worker = makeWorker();
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (event) => this.end(event.message || "The page's worker could not be started.");
  }

  // Ask the worker; `onNote` hears what it says before it is done.
  async call(type, values = {}, onNote = null) {
    if (this.ended) throw new Error(this.ended);
    const id = (this.count += 1);
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject, onNote });
      this.worker.postMessage({ id, type, ...values });
    });
  }

  stop() {
    this.worker.postMessage({ type: "stop" });
  }

  // Terminate the worker: its memory comes back, and whatever still runs or is asked later fails with `reason`.
  end(reason = "The model was unloaded.") {
    this.ended ??= reason;
    this.worker.terminate();
    const error = new Error(reason);
    for (const { reject } of this.calls.values()) reject(error);
    this.calls.clear();
  }

  receive({ id, note, result, error, kept = false }) {
    const call = this.calls.get(id);
    if (!call) return;
    if (note) {
      call.onNote?.(note);
      return;
    }
    if (error && !kept) {
      this.end(error);
      return;
    }
    this.calls.delete(id);
    if (error) call.reject(new Error(error));
    else call.resolve(result);
  }
}
