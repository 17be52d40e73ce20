"""Pathfinder and Path-X: are two dots ends of one dashed curve? Pixels come one after the other."""

import math
from dataclasses import dataclass

import numpy as np

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError

Dash = tuple[tuple[float, float], tuple[float, float]]
_IMAGES, _TRIES, _TURNS = 100, 40, 6  # of an image, of a curve, and of a dash
_INK, _DOT = 1.2, 1.8  # widths of dashes and radii of dots, in pixels


@dataclass(frozen=True)
class Pathfinder:
    """Grey images of side^2 pixels, row by row; at the last pixel 1 is asked if dots share a curve.

    Two curves of `dashes` dashes each and `distractors` of a third of it stand apart from one
    another. A curve goes on straight but for a turn of up to `turn` radians after each dash. Two
    dots mark both ends of the first curve (1) or one end of each (0), evenly. Ids are intensities
    0 to 255. Side 128 is Path-X: 16384 tokens.

    Source: Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated
    recurrent units", section 3 and appendix, https://arxiv.org/abs/1805.08315; Tay et al. 2021,
    Long Range Arena, section 2.2, https://arxiv.org/abs/2011.04006 (side 32, 14 dashes).
    Departure: drawn anew at the side that is asked for, where the papers shrink images of 300.
    """

    side: int = 32
    dashes: int = 14
    distractors: int = 2
    dash: float = 1.6
    gap: float = 1.2
    turn: float = 0.7
    clearance: float = 1.6

    def __post_init__(self) -> None:
        require_types(self)
        require_finite(self, "side", low=8)
        require_finite(self, "dashes", low=2)
        require_finite(self, "distractors", low=0)
        require_finite(self, "turn", low=0.0, high=math.pi)
        require_positive(self, "dash", "gap", "clearance")
        room = 2 * self.dashes * (self.dash + self.gap) * (self.dash + 2 * self.clearance)
        if room > self.side**2:
            raise ConfigError(
                f"Pathfinder.side must leave room for two curves of {self.dashes} dashes, about "
                f"{math.ceil(math.sqrt(room))} pixels, got {self.side}"
            )

    @property
    def vocab(self) -> int:
        """Intensities."""
        return 256

    @property
    def length(self) -> int:
        """Pixels of an image."""
        return self.side**2

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, side^2]."""
        labels = random.integers(0, 2, count)
        images = [self.image(random, bool(label)) for label in labels]
        targets = np.full((count, self.length), -1, np.int32)
        targets[:, -1] = labels
        return np.stack(images).reshape(count, -1).astype(np.int32), targets

    def image(self, random: np.random.Generator, connected: bool) -> np.ndarray:
        """One image [side, side] of intensities.

        Raises ConfigError where curves of these sizes find no room.
        """
        for _ in range(_IMAGES):
            if (curves := self._curves(random)) is not None:
                break
        else:
            raise ConfigError(
                f"Pathfinder: {_IMAGES} drawings of curves found no room for all, with {self}"
            )
        first, second = curves[:2]
        dots = (first[0][0], first[-1][1]) if connected else (first[0][0], second[-1][1])
        return self._rastered(np.concatenate([*curves, *([[dot, dot]] for dot in dots)]))

    def _curves(self, random: np.random.Generator) -> list[np.ndarray] | None:
        """Curves [dashes, 2 ends, 2] that keep their distance; None where one found no room."""
        short = max(2, self.dashes // 3)
        curves: list[np.ndarray] = []
        taken = np.zeros((self.side, self.side), bool)
        for dashes in (self.dashes, self.dashes, *(short,) * self.distractors):
            for _ in range(_TRIES):
                curve = self._curve(random, dashes, taken)
                if len(curve) == dashes:
                    break
            else:
                return None
            for dash in curve:
                self._take(taken, dash)
            curves.append(np.array(curve))
        return curves

    def _curve(self, random: np.random.Generator, dashes: int, taken: np.ndarray) -> list[Dash]:
        """One curve inside, away from what is taken and from itself; or as far as it came."""
        near = 1 + math.ceil((self.dash + self.clearance) / (self.dash + self.gap))
        taken = taken.copy()
        made: list[Dash] = []
        (y, x), heading = random.uniform(2, self.side - 3, 2), random.uniform(0, 2 * math.pi)
        for _ in range(dashes):
            for turn in random.uniform(-self.turn, self.turn, _TURNS):
                dy, dx = math.sin(heading + turn), math.cos(heading + turn)
                dash = ((y, x), (y + self.dash * dy, x + self.dash * dx))
                if self._free(taken, dash):
                    break
            else:
                return made
            if len(made) >= near:
                self._take(taken, made[-near])
            made.append(dash)
            heading += turn
            y, x = y + (self.dash + self.gap) * dy, x + (self.dash + self.gap) * dx
        return made

    def _free(self, taken: np.ndarray, dash: Dash) -> bool:
        inside = all(1 <= at <= self.side - 2 for end in dash for at in end)
        return inside and not any(taken[round(y), round(x)] for y, x in dash)

    def _take(self, taken: np.ndarray, dash: Dash) -> None:
        """Marks what is nearer to the dash's middle than half a dash and the clearance."""
        y, x = ((dash[0][i] + dash[1][i]) / 2 for i in range(2))
        reach = self.dash / 2 + self.clearance
        low, high = (max(0, math.floor(at - reach)) for at in (y, x)), math.ceil(2 * reach) + 2
        top, left = low
        part = taken[top : top + high, left : left + high]
        row, column = np.ogrid[: part.shape[0], : part.shape[1]]
        part |= (row + top - y) ** 2 + (column + left - x) ** 2 < reach**2

    def _rastered(self, strokes: np.ndarray) -> np.ndarray:
        """Ink falls off linearly over one pixel around a dash, the last two strokes are dots."""
        grid = np.moveaxis(np.mgrid[: self.side, : self.side], 0, -1)[..., None, :]
        begin, along = strokes[:, 0], strokes[:, 1] - strokes[:, 0]
        size = np.maximum((along**2).sum(-1), 1e-9)
        share = np.clip(((grid - begin) * along).sum(-1) / size, 0, 1)
        away = np.sqrt(((grid - begin - share[..., None] * along) ** 2).sum(-1))
        reach = np.full(len(strokes), _INK / 2)
        reach[-2:] = _DOT
        return np.rint(255 * np.clip(reach + 0.5 - away, 0, 1).max(axis=-1))
