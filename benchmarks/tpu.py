"""Plans the shipped TPU configs, and compares with T5X's network compiled in the same way.

    pip install 't5jax[plan]'
    python benchmarks/tpu.py [ROW ...] [--results FILE] [--write docs/performance.md]

Every time is the estimate of libtpu's compiler, of which the table says the version; no TPU takes
part. A row takes a minute or more of a core to compile, and some GiB of memory. --results keeps the
rows that are done in a JSON file; --write makes a page of them.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from t5jax.batch import train_spec
from t5jax.config import load_config, override
from t5jax.plan.chips import find_topology
from t5jax.plan.plan import DoesNotFit, plan_step


@dataclasses.dataclass(frozen=True)
class Row:
    """A config on a topology, what it should reach, and T5X's estimate."""

    what: str
    config: str
    topology: str
    changes: dict
    target: str
    t5x_ms: float | None = None
    t5x_gib: float | None = None
    has_inputs: bool = True


# T5X's network and Adafactor (unrolled for base, scanned with remat for large), compiled for the
# same chip with libtpu 0.0.52.
ROWS = {
    "base": Row(
        "T5 1.1 base, 32 x (512 + 114)", "t5_pretrain:base", "v5e:1x1", {}, "107 ms", 213.8, 9.0
    ),
    "large": Row(
        "T5 1.1 large, 16 x (512 + 114)", "t5_pretrain:large", "v5e:1x1", {}, "270 ms", 547, 4.6
    ),
    "xxl": Row("T5 1.1 XXL, 512 x (512 + 128)", "t5_pretrain:xxl", "v5p:4x4x4", {}, "55 % MFU"),
    "gpt2_medium": Row(
        "GPT-2 medium, 32 x 2,048",
        "gpt_pretrain:gpt2_medium",
        "v5e:2x2",
        {},
        "50 % MFU",
        has_inputs=False,
    ),
    "llama3_8b": Row(
        "Llama 3 8B, 64 x 2,048",
        "gpt_pretrain:llama3_8b",
        "v5p:2x2x4",
        {},
        "50 % MFU",
        has_inputs=False,
    ),
    # Other ways to run the first.
    **{
        f"base_{remat}{'' if scan else '_unrolled'}": Row(
            f"base, {remat}, layers {'scanned' if scan else 'unrolled'}",
            "t5_pretrain:base",
            "v5e:1x1",
            {"model.remat": remat, "model.scan_layers": scan},
            "",
        )
        for remat, scan in (("minimal", True), ("full", True), ("none", False))
    },
}


def measure(row: Row, any_libtpu: bool) -> dict:
    """Returns the plan of a row, and the time to compile it."""
    config = override(load_config(row.config), row.changes)
    topology = find_topology(row.topology, any_libtpu=any_libtpu)
    spec = train_spec(config, has_inputs=row.has_inputs)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        found = plan_step(config, topology, spec)[0].to_json()
    except DoesNotFit as error:
        found = {"problem": str(error), "settings": row.changes}
    found["compile_seconds"] = time.perf_counter() - start
    found["compile_cpu_seconds"] = time.process_time() - cpu
    return found


HEAD = (
    "| what | chips | remat | target | step, ms | MFU | GiB, temporaries | T5X, ms, GiB | "
    "T5X / t5jax | compiled in (CPU) |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table(results: dict) -> str:
    """Returns the rows as Markdown."""
    lines = [HEAD]
    for name, row in ROWS.items():
        if name not in results:
            continue
        plan = results[name]
        cells = [row.what, row.topology]
        compiled = f"{plan['compile_seconds']:.0f} s ({plan['compile_cpu_seconds']:.0f} s)"
        if "problem" in plan:
            cells += [str(plan["settings"].get("model.remat", "")), row.target, "does not fit"]
            cells += ["", plan["problem"].split(" do not fit")[0], "", "", compiled]
        else:
            ms = plan["seconds"] * 1e3
            t5x = f"{row.t5x_ms}, {row.t5x_gib}" if row.t5x_ms else ""
            ratio = f"{row.t5x_ms / ms:.2f}" if row.t5x_ms else ""
            cells += [plan["settings"]["model.remat"], row.target, f"{ms:.1f}"]
            cells += [f"{plan['mfu']:.1%}", f"{plan['memory']['temporaries'] / 2**30:.2f}"]
            cells += [t5x, ratio, compiled]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels(results: dict) -> str:
    """Returns what of each step is kernels, at peak rates, and waiting, as Markdown."""
    lines = ["| what | in kernels, ms | waiting for other devices, ms | HBM left, GiB |"]
    lines += ["|---|---|---|---|"]
    for name, row in ROWS.items():
        if plan := results.get(name):
            if "problem" in plan:
                continue
            cost, memory = plan["cost"], plan["memory"]
            cells = [row.what, f"{cost['kernels'] * 1e3:.1f}", f"{cost['waiting'] * 1e3:.1f}"]
            cells += [f"{memory['left'] / 2**30:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# Performance on TPUs, as the compiler estimates it

No TPU has run these: they are the estimates of {versions}, written by `benchmarks/tpu.py --write`.
T5X's figures are its own network and Adafactor, compiled for the same chip with libtpu 0.0.52.

{table}

{kernels}

## What was tried

T5 1.1 base on one v5e. Its products take 68 ms at the chip's peak and some 85 ms as the compiler
makes them; kernels, optimizer, and head and loss take another 9, 13 and 6 ms. Beyond that, `full`,
the default, has 28 ms of computing again. Others:

- `minimal` takes 162.1 ms and 8.45 GiB. A scan stacks what is kept of all layers. Products write
  into the stack as they compute (0.3 ms for all queries, 1.3 ms for a hidden product of the MLP),
  but the kernels read copies: 1.8 ms each for queries, keys and values, as long as computing them.
- `mlp` keeps the MLP's hidden products alone: 2.8 ms less than `full` in the encoder alone. The
  whole step has not been compiled with it.
- Layers unrolled and nothing computed again: 6.6 ms a layer of the encoder instead of 7.3, in two
  layers alone, which took 66 s of CPU to compile. Of each, 1.3 ms are the gradient of `wi_0`'s
  input, in which the activation's gradient is computed once for every tile.
- 64 MiB of scoped VMEM: the encoder was not compiled after 99 s of CPU, instead of 27.

XXL on v5p:4x4x4. With `fsdp` over all 64 chips, libtpu makes each gathering of a parameter, and
each scattered sum of a gradient, an `all-reduce` of the whole: 216 ms of waiting, and most of 178
ms more to write the zeros that pad the parts: 968 ms, 38.5 %. With `--mesh.data 4 --mesh.fsdp 16`,
the default, it gathers and scatters over a plane of the torus, and writes no zeros. Keeping all
results of the layers (`none`, 55 GiB of temporaries) takes 798 ms: they are written and read again.

Gradients of weights leave each product in bfloat16, after a sum in float32 over the tokens of a
device; devices exchange them so, and the optimizer computes in float32. The unembedding's are
summed over chunks in float32, and the embedding's over the occurrences of a token. Measured on one
CPU, with a T5 of two and two layers (d_model 128) and 400 steps on this project's own text, for two
seeds: the mean loss of steps 201 to 400 is 1.8131 and 1.8127, and where products return gradients
in float32, 1.8122 and 1.8116. What devices add up in bfloat16 has not been measured.

## How the figures come about

`t5jax plan CONFIG --topology v5e:2x2` prints them for any config; it compiles the step that
`t5jax train` runs (`t5jax/program.py`) with libtpu, on any Linux machine.

- **Memory** is what the compiler has allotted: certain.
- **Step**: the sum of the compiler's cycles for each fusion and product, loops times their rounds,
  divided by the clock (`t5jax/plan/chips.py`). It is pessimistic for what only moves bytes. Pallas
  kernels have no cycles; they are charged by the FLOPs, bytes and exponentials that they state, at
  the chip's peak rates, whichever takes longest: optimistic, so their share stands beside it.
- **Communication** is charged at the rate of the links, where computation does not hide it.
- **MFU** = FLOPs of a step / (seconds x devices x peak). FLOPs are those of the matrix products in
  the forward pass, times three: once forward, twice backward; recomputation does not count.
  Attention's scores count as full squares, also where a mask hides half, as in PaLM
  (arXiv:2204.02311, appendix B). Cross-attention's keys and values count for each source token.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--results", type=Path, help="JSON file of rows that are done")
    parser.add_argument("--write", type=Path, help="page to write")
    parser.add_argument(
        "--any-libtpu", action="store_true", help="also one that jax does not ask for"
    )
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")

    def done() -> dict:
        there = args.results and args.results.exists()
        return json.loads(args.results.read_text()) if there else {}

    results = done()
    for name in args.rows or ROWS:
        if name not in results:
            print(f"compiling {name}", flush=True)
            results = done() | {name: measure(ROWS[name], args.any_libtpu)}
            if args.results:
                args.results.write_text(json.dumps(results))
    versions = {f"libtpu {r['libtpu']}, jax {r['jax']}" for r in results.values() if "libtpu" in r}
    print(table(results), kernels(results), sep="\n\n")
    print(f"estimates of the TPU compiler: {'; '.join(sorted(versions))}")
    if args.write:
        page = PAGE.format(
            versions=" and ".join(sorted(versions)), table=table(results), kernels=kernels(results)
        )
        args.write.write_text(page)


if __name__ == "__main__":
    main()
