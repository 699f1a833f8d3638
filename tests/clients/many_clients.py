"""Many of openpi's own clients, as published, against `pirouette serve --device null`.

`many_clients.py --clients 64 --processes 4 --seconds 30` starts a server on the latency table
measured on an H200 ($PIROUETTE names the binary) and says what the clients got of the engine's
offline batch throughput. Clients are threads of a few processes: a client spends its time waiting.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request

import numpy as np
from openpi_client import websocket_client_policy

ROOT = pathlib.Path(__file__).parents[2]
ROBOT = """
name = "many"
family = "pi0"
horizon = 10
norm = "identity"
[robot]
kind = "generic"
output_dims = 7
[[robot.cameras]]
key = "observation/image"
slot = "base_0_rgb"
[[robot.cameras]]
key = "observation/left"
slot = "left_wrist_0_rgb"
[[robot.cameras]]
key = "observation/right"
slot = "right_wrist_0_rgb"
[[robot.state]]
key = "observation/state"
dims = 8
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def observation(index: int) -> dict:
    image = np.random.default_rng(index).integers(256, size=(224, 224, 3), dtype=np.uint8)
    cameras = ("observation/image", "observation/left", "observation/right")
    return {key: image for key in cameras} | {
        "observation/state": np.zeros(8, dtype=np.float32),
        "prompt": "pick up the red cup",
        "seed": index,
    }


def robots(port: int, first: int, count: int, until: float, results) -> None:
    """`count` clients in threads of this process; each reports latencies and what went wrong."""
    latencies: list[tuple[float, float]] = []
    errors: list[str] = []

    def robot(index: int):
        try:
            client = websocket_client_policy.WebsocketClientPolicy(host="127.0.0.1", port=port)
            request, known = observation(index), None
            while time.time() < until:
                began = time.perf_counter()
                actions = client.infer(request)["actions"]
                latencies.append((time.time(), time.perf_counter() - began))
                if known is not None and not np.array_equal(actions, known):
                    errors.append(f"client {index}: other actions for the same seed")
                known = actions
        except Exception as error:  # noqa: BLE001 (a thread must tell what it saw)
            errors.append(f"client {index}: {error!r}")

    threads = [threading.Thread(target=robot, args=(first + i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((latencies, errors))


def measure(pirouette: str, clients: int, processes: int, seconds: float) -> dict:
    """Runs server and clients; latencies in ms, answers a second, and the share of offline
    batches of as many samples as there are clients."""
    benchmark = json.loads((ROOT / "benchmarks/h200/pi0-batch.json").read_text())["results"]
    table = ",".join(f"{row['batch']}:{row['p50_ms']}" for row in benchmark)
    offline = max(row["samples_per_s"] for row in benchmark if row["batch"] <= clients)
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(ROBOT)
        config.flush()
        server = subprocess.Popen(
            [pirouette, "serve", config.name, "--device", f"null:{table}", "--port", str(port),
             "--max-batch", str(clients)],
            env=os.environ | {"PIROUETTE_LOG": "error"},
        )
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                    break
                except OSError:
                    assert server.poll() is None, "the server ended"
                    time.sleep(0.1)
            spawn = multiprocessing.get_context("spawn")
            results, began = spawn.Queue(), time.time()
            # Starting the interpreters is not part of what is measured: the last seconds are.
            until = began + 5 + seconds
            each = [clients // processes + (i < clients % processes) for i in range(processes)]
            workers = [
                spawn.Process(target=robots, args=(port, sum(each[:i]), n, until, results))
                for i, n in enumerate(each)
            ]
            for worker in workers:
                worker.start()
            parts = [results.get(timeout=seconds + 120) for _ in workers]
            for worker in workers:
                worker.join()
            server.send_signal(signal.SIGTERM)
            clean = server.wait(timeout=30) == 0
        finally:
            server.kill()
            server.wait()
    answers = [answer for part in parts for answer in part[0]]
    latencies = [took * 1e3 for at, took in answers if until - seconds < at <= until]
    rate = len(latencies) / seconds
    return {
        "clients": clients,
        "answers": len(latencies),
        "errors": [error for part in parts for error in part[1]],
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "answers_per_s": rate,
        "of_offline": rate / offline,
        "clean_exit": clean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    report = measure(os.environ["PIROUETTE"], args.clients, args.processes, args.seconds)
    print(json.dumps(report, indent=2))
    raise SystemExit(bool(report["errors"]) or not report["clean_exit"])


if __name__ == "__main__":
    main()
