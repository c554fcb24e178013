"""Time a `Service` in this process, without HTTP: the base alone, and 8, 64 and 1,024 adapters.

    python -m benchmarks.serve.core [--clients 64] [--seconds 8] [--rounds 3] [--precision fp32]

A ViT-B-32 of random weights at true size; adapters of r=16 on the text tower's attention, asked for with
Zipf-distributed frequencies (exponent 1), with memory for 128 of them; texts of about 10 tokens from clients
that each wait for their answer before they ask again. The cases take turns, round by round. Beside requests
a second, requests a second of processor time are printed: a busy machine changes those less.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.serve.args import ServiceArgs
from clipgraft.serve.messages import Encode, Stats, Text, With
from clipgraft.serve.service import Service
from clipgraft.text_tables import Table

COUNTS = (0, 8, 64, 1024)
Result: TypeAlias = tuple[float, float, list[float]]
DISTINCT, IN_MEMORY, RANK = 4, 128, 16
WORDS = (
    "red",
    "dog",
    "house",
    "on",
    "the",
    "hill",
    "photo",
    "of",
    "two",
    "cats",
    "old",
    "car",
    "at",
    "night",
)


def make_adapters(folder: Path, count: int) -> None:
    """Write `count` adapter folders; after the first few they are links, which are read all the same."""
    clip = cg.load("ViT-B-32", "none")
    cg.apply_lora(clip, r=RANK, targets="text-attention")
    for number in range(count):
        place = folder / f"a{number}"
        if number >= DISTINCT:
            place.symlink_to(folder / f"a{number % DISTINCT}")
            continue
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in require_lora(clip).chosen().parameters():
                parameter.copy_(0.02 * torch.randn_like(parameter))
        cg.save_adapter(clip, place)


def asking(service: Service, adapters: int, clients: int, seconds: float) -> Result:
    """Ask for some seconds: requests a second, the same of processor time, and the latency of each."""
    shares = 1 / np.arange(1, adapters + 1) if adapters else np.ones(1)
    shares = shares / shares.sum()
    took: list[list[float]] = [[] for _ in range(clients)]
    stop = threading.Event()

    def client(number: int) -> None:
        draw, words = np.random.default_rng(number), random.Random(number)
        while not stop.is_set():
            name = f"a{draw.choice(adapters, p=shares)}" if adapters else None
            text = Text(" ".join(words.choices(WORDS, k=8)))
            started = time.perf_counter()
            service.ask(Encode((text,), With(name)))
            took[number].append(time.perf_counter() - started)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started, spent = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    wall, spent = time.perf_counter() - started, time.process_time() - spent
    all_took = [each for own in took for each in own]
    return len(all_took) / wall, len(all_took) / spent, all_took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--max-batch-tokens", type=int, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_adapters(folder, max(COUNTS))
        run(folder, given)


def run(folder: Path, given: argparse.Namespace) -> None:
    services: dict[int, Service] = {}
    clip = cg.load("ViT-B-32", "none", precision=given.precision)  # they take turns with it
    for count in COUNTS:
        words = tuple(f"a{number}={folder / f'a{number}'}" for number in range(count))
        args = ServiceArgs(
            adapters=words,
            adapter_memory_mb=IN_MEMORY * 3.2,
            max_batch_tokens=given.max_batch_tokens,
            max_queue_seconds=600,
            timeout=600,
        )
        started = time.perf_counter()
        services[count] = Service(clip, args)
        print(f"{count} adapters: ready in {time.perf_counter() - started:.1f} s")
    found: dict[int, list[Result]] = {count: [] for count in COUNTS}
    for number in range(given.rounds + 1):
        for count, service in services.items():
            result = asking(service, count, given.clients, given.seconds / (1 if number else 2))
            if number:  # the first round reads what fits into memory
                found[count].append(result)
    print(table(found, services).text())
    for service in services.values():
        service.shut_down()


def table(found: dict[int, list[Result]], services: dict[int, Service]) -> Table:
    """Medians over the rounds, and the latencies of all."""
    base = [float(np.median([result[part] for result in found[0]])) for part in range(2)]
    rows = []
    for count in COUNTS:
        took = np.array([each for result in found[count] for each in result[2]])
        wall, spent = (float(np.median([result[part] for result in found[count]])) for part in range(2))
        told = services[count].ask(Stats()).counts
        rows.append(
            (
                f"{count or 'base'}",
                *(f"{wall:.1f}", f"{wall / base[0]:.2f}", f"{spent:.1f}", f"{spent / base[1]:.2f}"),
                *(f"{1e3 * np.quantile(took, q):.0f} ms" for q in (0.5, 0.95)),
                f"{told['items_text'] / told['batches_text']:.1f}",
                f"{told['adapter_loads']}",
            )
        )
    names = ("adapters", "req/s", "of base", "per cpu-s", "of base", "p50", "p95", "rows", "loads")
    return Table("", names, tuple(rows))


if __name__ == "__main__":
    main()
