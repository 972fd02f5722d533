"""A variational autoencoder on real digits: report, fuse, train, un-fuse, export.

The question that conjoin began with: is there a `Split` or `Parallel` that works like
`nn.Sequential`? There is, and whether the two heads are written side by side (`Parallel`) or as
one wide layer (`Split`) is no longer a choice to make: `conjoin.optimize` goes from one to the
other, with the same weights, and `conjoin.unfuse` goes back.

    python examples/vae_digits.py
"""

from __future__ import annotations

import importlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

import conjoin
from conjoin.nn import Parallel, Split, Unite

BATCH = 64
CODE = 64
TIMED_PAIRS = 30
# A wide layer adds the same numbers in another order, so results differ in their last digits, and
# training makes more of that with every step. In float64 this stays far below any real mistake.
LOSS_TOLERANCE = 1e-6
OUTPUT_TOLERANCE = 1e-10

Outputs = tuple[Tensor, Tensor, Tensor]


class VAE(nn.Module):
    """Images of 1x28x28 to a code of 64 numbers, and back to the logits of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Conv2d(16, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(3),
            Parallel(nn.Conv2d(64, CODE, 2), nn.Conv2d(64, CODE, 2)),
            Unite(),
            Split(nn.Flatten(), parts=2),
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE, 16 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (16, 7, 7)),
            nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> Outputs:
        """Gives the logits of the pixels, and the code's mean and logarithmic variance."""
        mean, log_variance = self.encoder(images)
        code = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
        return self.decoder(code), mean, log_variance


def digits() -> Tensor:
    """The 1,797 handwritten digits of scikit-learn, 8x8 resized to 28x28, in [0, 1]."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)


def loss_of(outputs: Outputs, images: Tensor) -> Tensor:
    """The negative evidence lower bound, in nats per image."""
    logits, mean, log_variance = outputs
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
    return (reconstruction + divergence) / len(images)


def run(model: nn.Module, images: Tensor, seed: int) -> Outputs:
    """One call with the noise that belongs to `seed`."""
    torch.manual_seed(seed)
    outputs: Outputs = model(images)
    return outputs


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, seed: int) -> float:
    """One training step; gives its loss."""
    optimizer.zero_grad()
    loss = loss_of(run(model, images, seed), images)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


def heading(text: str) -> None:
    """Prints a section's title."""
    print(f"\n{text}\n{'=' * len(text)}\n")


def check(what: str, difference: float, tolerance: float) -> None:
    """Prints how far two results are apart, and stops the program if that is too far."""
    print(f"  {what:<58} {difference:.1e}")
    if not difference <= tolerance:
        raise SystemExit(f"{what}: {difference} is over {tolerance}")


def apart(first: Outputs | Tensor, second: Outputs | Tensor) -> float:
    """The largest difference of two tensors, or of two tuples of them."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (first - second).abs().max().item()
    return max(apart(a, b) for a, b in zip(first, second, strict=True))


def show_report(model: VAE) -> None:
    """Saves the model, and runs the command line on the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vae.pt")
        torch.save(model, file)
        arguments = ["report", str(file), "--trust-pickle", "--input", f"{BATCH}x1x28x28"]
        print("$", shlex.join(["conjoin", "report", file.name, *arguments[2:]]), end="\n\n")
        command = [sys.executable, "-m", "conjoin", *arguments]
        # In this folder, so that the class of the saved model can be imported.
        subprocess.run(command, check=True, cwd=Path(__file__).parent)


def show_two_spellings(model: VAE, images: Tensor) -> None:
    """Compares the heads side by side with the wide layer that one would write by hand."""
    layers = list(model.encoder)
    heads = layers[6]
    assert isinstance(heads, Parallel)
    split = heads.to_split()
    print(f"{heads}\n\nas one wide layer, with the same weights:\n\n{split}\n")
    wide = nn.Sequential(*layers[:6], split, *layers[7:])
    check(
        "Parallel and Split, largest difference", apart(model.encoder(images), wide(images)), 1e-5
    )
    back = split.to_parallel()
    check("and back to Parallel, weights", weights_apart(heads, back), 0)


def weights_apart(first: nn.Module, second: nn.Module) -> float:
    """The largest difference of two modules' parameters and buffers of the same names."""
    a, b = first.state_dict(), second.state_dict()
    if list(a) != list(b):
        raise SystemExit(f"the names differ: {list(a)} and {list(b)}")
    return max(apart(a[name], b[name]) for name in a)


def train(plain: VAE, fused: VAE, images: Tensor, epochs: int) -> None:
    """Trains both in float64 on the same batches with the same noise, and prints their losses."""
    models = {"plain": plain, "optimized": fused}
    optimizers = {name: torch.optim.Adam(m.parameters(), 2e-3) for name, m in models.items()}
    furthest, seed = 0.0, 0
    print(f"  {'epoch':>5}  {'plain':>9}  {'optimized':>9}   loss in nats per image")
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        sums = dict.fromkeys(models, 0.0)
        for batch in torch.split(order, BATCH):
            seed += 1
            losses = {
                name: step(model, optimizers[name], images[batch], seed)
                for name, model in models.items()
            }
            furthest = max(furthest, abs(losses["plain"] - losses["optimized"]))
            sums = {name: sums[name] + losses[name] * len(batch) for name in models}
        row = "  ".join(f"{total / len(images):9.4f}" for total in sums.values())
        print(f"  {epoch + 1:>5}  {row}")
    print()
    check("largest difference of the losses at any step", furthest, LOSS_TOLERANCE)


def show_speed(images: Tensor) -> None:
    """Prints the launches counted, and the time of interleaved steps in float32 as a ratio."""
    plain = VAE()
    fused = conjoin.optimize(plain, (images,))
    launches = conjoin.report(fused, (images,)).launches
    before, after = launches.before, launches.after
    print(f"  kernel launches, forward:  {before.forward} -> {after.forward}")
    print(f"  kernel launches, backward: {before.backward} -> {after.backward}\n")
    optimizers = [torch.optim.Adam(model.parameters(), 0.0) for model in (plain, fused)]
    ratios = []
    for pair in range(TIMED_PAIRS):
        seconds = []
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            start = time.perf_counter()
            step(model, optimizer, images, pair)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"  step time, plain / optimized: {middle:.2f}  (middle half: {low:.2f} to {high:.2f})")
    print("  On a CPU the arithmetic dominates; launches cost where the device waits for them.")


def show_way_back(fused: VAE, images: Tensor) -> None:
    """Un-fuses, loads the trained weights into the class, exports, and compares all of them."""
    plain = conjoin.unfuse(fused)
    loaded = VAE().double()
    loaded.load_state_dict(fused.state_dict(), strict=True)
    exported = torch.export.export(plain, (images,)).module()
    with torch.no_grad():
        expected = run(fused, images, seed=7)
        check("weights of the un-fused model", weights_apart(fused, plain), 0)
        check("weights loaded into the plain class", weights_apart(fused, loaded), 0)
        for name, model in {"un-fused": plain, "loaded": loaded, "exported": exported}.items():
            check(
                f"outputs of the {name} model",
                apart(expected, run(model, images, seed=7)),
                OUTPUT_TOLERANCE,
            )


def main(epochs: int = 8) -> None:
    """Runs the demonstration.

    Args:
        epochs: how often to go through the 1,797 images.

    Raises:
        SystemExit: two results that must agree do not.
    """
    images = digits()
    torch.manual_seed(0)
    plain = VAE()

    heading("1. What can be fused")
    show_report(plain)

    heading("2. Two spellings of the same heads")
    show_two_spellings(plain, images[:BATCH])

    heading("3. Training, plain and optimized side by side")
    plain, precise = plain.double(), images.double()
    fused = conjoin.optimize(plain, (precise[:BATCH],))
    tensors = [len(list(model.parameters())) for model in (plain, fused)]
    if tensors[0] == tensors[1]:
        raise SystemExit("nothing was fused")
    print(f"  parameters: {tensors[0]} tensors -> {tensors[1]}, the same numbers\n")
    train(plain, fused, precise, epochs)

    heading("4. What it saves")
    show_speed(images[:BATCH])

    heading("5. The way back")
    show_way_back(fused, precise[:BATCH])
    print("\nAll outputs agree.")


if __name__ == "__main__":
    # Layers this small gain nothing from a second thread, and lose much to other programs.
    torch.set_num_threads(1)
    # By its name and not as __main__, so that the command line can unpickle the class.
    importlib.import_module("vae_digits").main()
