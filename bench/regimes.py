"""The kinds of data, *regimes*, that the benches run on: an op is fast only if it is fast on all of them.

python -m bench.regimes --make    # trains 1,000 steps and writes bench/data, in some minutes on one core

`bench.report.worst.WORDS` describes each regime, and `bench.results.USUAL` names the usual one of each op.

bench/data holds codes of a real run: mu and logvar of 512 training crops in float16, from the encoder after 0, 100 and
1,000 steps. The run is `bomkern train` at 32 px with seed 0 and one thread. It has 128 latents (96 of structure and 32
of appearance; the default is 48 and 16), because the benches have D = 128. A larger batch repeats the 512 rows, and
moves each repeated mu by a draw of its own posterior. A larger D repeats the columns with shifted rows.
"""

from __future__ import annotations

import argparse
import functools
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import DEVICE
from bomkern.constraints import BARRIER, HARD, LINEAR, Constraint

DATA = Path(__file__).parent / "data"
STEPS, ROWS = (0, 100, 1000), 512  # of the run in bench/data
HALF = "half"
CODES = (*(f"step {step}" for step in STEPS), "normal", "separated", "collapsed", "sharp", HALF)
GOALS = ("near the ideal", "far beyond", "all tied", "one behind", "one hopeless", HALF)
SIZES = [{"B": batch, "D": 128} for batch in (512, 4096, 65536)]
if DEVICE == "cuda":
    SIZES.append({"B": 1_048_576, "D": 128})
CLUSTERS, PLACES = 64, 5  # clusters, and the possible positions of their centres in a dimension
APART, SPREAD = 10.0, 2.0  # distance of positions, and deviation of means in a cluster, in posterior deviations
Inputs = tuple[Tensor, ...]


def leaves(tensors: Sequence[Tensor], regime: str) -> Inputs:
    """Return the tensors on `DEVICE` in the regime's dtype, as leaves that require gradients."""
    dtype = torch.bfloat16 if regime == HALF else torch.float32
    return tuple(x.to(DEVICE, dtype).requires_grad_() for x in tensors)


def codes(regime: str, B: int, D: int) -> Inputs:
    """Return z, mu and logvar, [B, D] each, the same each time."""
    source = torch.Generator().manual_seed(0)
    mu, logvar, noise = _posteriors(regime, B, D, source)
    return leaves([mu + noise * torch.exp(logvar / 2), mu, logvar], regime)


def views(regime: str, B: int, D: int, count: int) -> Inputs:
    """Return ``count`` views of a code, [B, D] each: draws of one posterior, or in the usual regime a noisy code."""
    source = torch.Generator().manual_seed(0)
    if regime == "noisy views":
        mu, scale = torch.randn(B, D, generator=source), torch.tensor(0.3)
    else:
        mu, logvar, _ = _posteriors(regime, B, D, source)
        scale = torch.exp(logvar / 2)
    return leaves([mu + scale * torch.randn(B, D, generator=source) for _ in range(count)], regime)


def _posteriors(regime: str, B: int, D: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu, logvar, and the noise of a sample."""
    mu, logvar, noise = torch.randn(3, B, D, generator=source).unbind()
    if regime == "busy and idle":
        return mu * torch.logspace(-1.5, 0.3, D), 0.5 * logvar - 1, noise
    if regime == "wide":
        return 0.3 * mu, 0.2 * logvar - 0.3, noise
    if regime.startswith("step") or regime == HALF:
        return (*_run_codes(f"step {STEPS[-1]}" if regime == HALF else regime, mu), noise)
    if regime == "separated":
        places = torch.randint(PLACES, (CLUSTERS, D), generator=source)
        centres = places[torch.randint(CLUSTERS, (B,), generator=source)]
        return math.exp(-1.5) * (APART * centres + SPREAD * mu), torch.full_like(mu, -3.0), noise
    if regime == "collapsed":
        return 0.03 * mu, 0.03 * logvar, noise
    if regime == "sharp":
        return mu, torch.full_like(mu, -8.0), noise
    if regime == "normal":
        return mu, 0.1 * logvar, noise
    raise KeyError(regime)


@functools.cache
def _kept(regime: str) -> tuple[Tensor, Tensor]:
    with zipfile.ZipFile(DATA / f"{regime.replace(' ', '_')}.npz") as file:
        return _halves(file.read("mu.npy")), _halves(file.read("logvar.npy"))


def _halves(npy: bytes) -> Tensor:
    """Read [ROWS, D] float16 from numpy's format without numpy, which a machine with torch need not have."""
    begin = 10 + int.from_bytes(npy[8:10], "little")
    return torch.frombuffer(bytearray(npy[begin:]), dtype=torch.float16).view(ROWS, -1).float()


def _run_codes(regime: str, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return mu and logvar of the shape of ``noise`` from bench/data, as the head of this file describes."""
    kept = _kept(regime)
    rows, columns = kept[0].shape
    row, column = torch.arange(noise.shape[0])[:, None], torch.arange(noise.shape[1])
    shifted = (row + 61 * (column // columns)) % rows
    mu, logvar = (x[shifted, column % columns] for x in kept)
    return mu + noise * torch.exp(logvar / 2) * (row >= rows), logvar


def goals(regime: str, constraints: Sequence[Constraint], B: int) -> Inputs:
    """Return raw values of the goals, [B] each, the same each time.

    In every regime but "uniform" the worst goals of a sample either tie exactly or differ by far more than rounding.
    """
    source = torch.Generator().manual_seed(0)
    count = len(constraints)
    if regime == "uniform":
        return leaves([torch.rand(B, generator=source) + 0.05 for _ in constraints], regime)
    # In each sample the goals take different steps from 0 to 1, and the worst goal changes from sample to sample.
    order = (torch.arange(count)[:, None] + torch.randint(count, (B,), generator=source)) % count
    steps = (order + 0.5 * torch.rand(count, B, generator=source, dtype=torch.float64)) / count
    if regime == HALF:
        deficits = 0.05 + steps
    elif regime == "near the ideal":
        deficits = 10 ** (4 * steps - 6)
    elif regime == "far beyond":
        deficits = 10 ** (2 * steps + 2)
    elif regime == "all tied":
        # Multiples of 1/64 are exact in single precision; the other curves would round them.
        linear = torch.tensor([constraint.curve == LINEAR for constraint in constraints])
        deficits = torch.randint(1, 129, (B,), generator=source) / 64 * linear[:, None]
    elif regime in ("one behind", "one hopeless"):
        deficits = 0.05 * steps
        far = torch.rand(B, generator=source)
        deficits[count // 2] = 8 + 4 * far if regime == "one behind" else 50 * 20**far
    else:
        raise KeyError(regime)
    return leaves([raw(c, d.double()) for c, d in zip(constraints, deficits, strict=True)], regime)


def raw(constraint: Constraint, deficit: Tensor) -> Tensor:
    """Return the raw value with this deficit, the one above the centre where there are two.

    The deficit of a hard constraint is at most 60, which takes 1e13 scales; more would overflow.
    """
    center, right, left, tail = constraint.ramp
    ramp = deficit
    if constraint.curve == HARD:
        ramp = torch.expm1(deficit.clamp(max=60)).sqrt()
    elif constraint.curve == BARRIER:
        ramp = torch.where(
            deficit <= -math.log(tail), -torch.expm1(-deficit), 1 - tail + tail * (deficit + math.log(tail))
        )
    return center + ramp / (right or left)


def make() -> None:
    """Train as `bomkern train` does, and save the encoder's codes of the same crops at each of `STEPS`."""
    import numpy as np

    from bomkern.train import loop
    from bomkern.train.config import Config
    from bomkern.train.data import load, to_float
    from bomkern.train.trainer import Trainer

    torch.set_num_threads(1)
    config = Config(structure=96, appearance=32, device="cpu")
    trainer = Trainer(config, loop.launch(config), load(None, config.image_size).train)
    image = to_float(trainer.crops.batch(ROWS, np.random.default_rng(0)), trainer.device)
    DATA.mkdir(exist_ok=True)
    for step in STEPS:
        while trainer.step < step:
            trainer.advance()
        with torch.no_grad():
            mu, logvar = (x.numpy().astype(np.float16) for x in trainer.vae.encoder(image))
        np.savez_compressed(DATA / f"step_{step}.npz", mu=mu, logvar=logvar)
        print(f"step {step}: mu has deviation {mu.std():.3g}, logvar is {logvar.mean():.3g} on average", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", required=True, help="train, and write bench/data again")
    parser.parse_args()
    make()
