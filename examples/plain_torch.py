"""Fira in a plain PyTorch loop: a small network on handwritten digits, rank 8 against full-rank Adam.

pip install fullrank scikit-learn
python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank import FiraAdamW, divide_params

LEARNING_RATE, EPOCHS, BATCH = 1e-3, 30, 64


class Network(nn.Module):
    """Two hidden layers; ``mlp`` is what the optimizer projects."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten digits (B x 10) for images (B x 64)."""
        scores: Tensor = self.head(self.mlp(images))
        return scores


def train(model: Network, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """A training loop as anywhere."""
    order = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def main() -> None:
    """Train twice from the same start and print both accuracies and both state sizes."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    train_images, test_images, train_labels, test_labels = train_test_split(images, labels, random_state=0)
    for name in ("Fira, rank 8", "Adam"):
        torch.manual_seed(0)
        model = Network()
        if name == "Adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        else:
            param_groups = divide_params(model, target_modules_list=["mlp"], rank=8)
            optimizer = FiraAdamW(param_groups, lr=LEARNING_RATE)
        train(model, optimizer, train_images, train_labels)
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
        print(f"{name:13} test accuracy {accuracy:.1%}, optimizer state {held:,} bytes")


if __name__ == "__main__":
    main()
