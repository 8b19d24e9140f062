"""`twostroke serve` with parts that only pretend: no model, no torch. Run as a script, with the flags of `serve`;
--model names a folder in which each part leaves a file with its process id, and "NAME-stopped" when it was stopped. A
part ends at once where there is a file "NAME-fails"; with a file "problem" the decode worker is never ready, for the
reason in it."""

import os
import signal
import sys
import time
from pathlib import Path

from cli import main, readiness, serve
from cli.children import Child
from cli.serve_config import ServeConfig
from tests.protos.fake_router import FakeRouter, serving
from twostroke.v1 import inference_pb2 as pb


def pretend(name: str, folder: Path, listen: str) -> None:
    if (folder / f"{name}-fails").exists():
        sys.exit(f"{name} says why")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print(f"{name} logs a line")
    written = folder / f"{name}-writing"
    written.write_text(str(os.getpid()))
    written.rename(folder / name)  # whoever reads it meanwhile finds the old one or the new one, whole
    if name == "router":
        load = pb.GetLoadResponse(workers=[pb.WorkerLoad(ready=True), pb.WorkerLoad(ready=True)])
        if (problem := folder / "problem").exists():
            load.workers.pop()
            load.problems.add(address="host:1", role=pb.WORKER_ROLE_DECODE, reason=problem.read_text())
        workers = [folder / "prefill_worker", folder / "decode_worker"]
        while not all(worker.exists() for worker in workers) and signal.SIGTERM not in signal.sigpending():
            time.sleep(0.02)
        with serving(FakeRouter(load=load), listen=listen):
            signal.sigwait({signal.SIGTERM})
    else:
        signal.sigwait({signal.SIGTERM})
    (folder / f"{name}-stopped").touch()


def fake_part(module: str, settings: object, config: ServeConfig, own: dict[str, object]) -> Child:
    return Child(module, [sys.executable, __file__, "--pretend", module, str(config.model), str(own["listen"])])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pretend"]:
        pretend(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        serve.part = fake_part
        readiness.LASTING_SECONDS = 0.5
        main.main("serve")
