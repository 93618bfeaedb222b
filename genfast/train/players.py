"""The players of a run at work: parameters, optimizer and loss of each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from genfast.train.recipe import OPTIMIZERS, Batch, Player, Recipe
from genfast.train.settings import Settings

# Of the streams of a run's seed: player k adds k STRIDE to the streams of the first.
STRIDE = 1 << 40


class Objective(nn.Module):
    """A player's loss as a module: what DDP and autocast wrap."""

    def __init__(self, player: Player, model: nn.Module):
        super().__init__()
        self.player, self.model = player, model

    def forward(self, batch: Batch, seeds: Tensor, step: int) -> Tensor:
        return self.player.loss(self.model, batch, seeds, step)


class Seat:
    """A player's place in a run. index: its order; stream: what it adds to a step's stream."""

    def __init__(self, index: int, player: Player, parameters: dict[str, nn.Parameter],
                 settings: Settings):  # fmt: skip
        self.player, self.stream, self.index = player, index * STRIDE, index
        self.parameters, self.settings = parameters, settings
        self.optimizer = OPTIMIZERS[player.optimizer](
            parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay,
            **player.arguments,
        )  # fmt: skip

    def prepare(self, accelerator, model: nn.Module) -> None:
        """Under DDP, which keeps the gradients of those that need one now: `alone` comes first."""
        self.accelerator = accelerator
        self.objective, self.stepper = accelerator.prepare(
            Objective(self.player, model), self.optimizer
        )

    def moves(self, step: int) -> bool:
        return (step + 1) % self.player.every == 0

    def gradients(self, batch: Batch, seeds: Tensor, share: float, step: int) -> tuple[Tensor, ...]:
        """The loss times share (), and the norm () of its gradients before they are clipped."""
        loss = self.objective(batch, seeds, step) * share
        self.stepper.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.unscale_gradients(self.stepper)  # this one's, of fp16
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        return loss, norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.player.lr


def seats(recipe: Recipe, model: nn.Module, options: dict, settings: Settings) -> list[Seat]:
    """A seat for each player. options: where they differ from the recipe's defaults. ValueError
    where a player has nothing to move, or two the same."""
    defaults = {name: option.default for name, option in recipe.options.items()}
    players = recipe.players(model, {**defaults, **options})
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owned = [{name: p for name, p in free.items() if player.owns(name)} for player in players]
    for player, own in zip(players, owned, strict=True):
        if not own:
            roots = ", ".join(dict.fromkeys(name.split(".")[0] for name in free))
            raise ValueError(
                f"moves: player {player.name!r} has no parameter: expected beginnings of names "
                f"of {roots}, got {player.moves}"
            )
    for i, name in ((i, name) for i, own in enumerate(owned) for name in own):
        if any(name in own for own in owned[:i]):
            raise ValueError(f"moves: expected one player a parameter, got several for {name}")
    if len({player.name for player in players}) < len(players):
        names = ", ".join(player.name for player in players)
        raise ValueError(f"name: expected another one for each player, got {names}")
    return [
        Seat(i, player, own, settings)
        for i, (player, own) in enumerate(zip(players, owned, strict=True))
    ]


def alone(seat: Seat, table: Sequence[Seat]) -> None:
    """Only the parameters of `seat` get gradients; a game of one is left as it is."""
    if len(table) > 1:
        for other in table:
            for p in other.parameters.values():
                p.requires_grad_(other is seat)


def together(table: Sequence[Seat]) -> None:
    """All of them again, and no gradient left."""
    for seat in table:
        seat.optimizer.zero_grad()
        for p in seat.parameters.values():
            p.requires_grad_(True)


def torch_seed(seed: int, step: int, rank: int, count: int, seat: Seat) -> int:
    """Of torch's generator, for dropout and the like: another one for each step, process and
    player."""
    return (seed * 2**32 + step * count + rank + (seat.index << 56)) % 2**63


def means(sums: dict[str, list[float]], table: Sequence[Seat], what: str) -> dict:
    """Of an epoch, what: "loss" or "grad_norm". Under NAME_what; a game of one has no names, its
    loss is train_loss. None of who has not moved. sums: of `Progress`."""
    total, number = {"loss": (0, 1), "grad_norm": (2, 3)}[what]
    found = {}
    for seat in table:
        name = seat.player.name or ("train" if what == "loss" else "")
        mine = sums.get(seat.player.name)
        found[f"{name}_{what}" if name else what] = mine[total] / mine[number] if mine else None
    return found
