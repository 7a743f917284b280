"""What reading all images of a source took: which were turned, scaled or cut, in a few lines for who trains on them."""

from collections import Counter

from netslim.data.pixels import Fit, Seen, Trait

_FAR = 1.5  # from square: more than photographs of 3:2 are, a third of which a centre crop leaves out
_DARK = 0.25  # of white; fewer than 64 of 256 grey levels are left of what is no brighter
_WORDS: dict[Trait, str] = {
    "turned": "turned upright by EXIF orientation (--data.no-upright leaves them)",
    "scaled": "scaled to 8 bits",
    "reduced": "read by the upper 8 of 16 bits a colour",
    "opaque": "read without transparency",
    "first": "read by the first of several pictures",
}


class Findings:
    """Counts over images; the same in any order."""

    def __init__(self) -> None:
        self.num = 0
        self.traits = Counter[Trait]()
        self._far, self._longest = 0, 1.0
        self._brightest, self._white = 0.0, 0.0

    def add(self, seen: Seen) -> None:
        """Counts one image."""
        self.num += 1
        self.traits.update(seen.traits)
        if seen.ratio > _FAR:
            self._far += 1
            self._longest = max(self._longest, seen.ratio)
        self._brightest, self._white = max(self._brightest, seen.brightest), max(self._white, seen.white)

    def notes(self, fit: Fit) -> tuple[str, ...]:
        """At most three lines: what was done to images, whether that left them dark, and what a crop takes of them."""
        lines = []
        if self.traits:
            parts = [f"{self.traits[trait]:,} {words}" for trait, words in _WORDS.items() if self.traits[trait]]
            lines.append(f"of {self.num:,} images {', '.join(parts)}")
        if 0 < self._brightest <= _DARK * self._white:
            lines.append(
                f"the brightest of the images that were scaled to 8 bits has {self._brightest:g} where {self._white:g} "
                "is white, so that all are dark; if it is white there, name it with --data.white"
            )
        if self._far and fit == "crop":
            lines.append(
                f"far from square (over {_FAR} to 1) are {self._far:,} of {self.num:,} images, up to "
                f"{self._longest:.1f} to 1, of which the centre crop leaves out {1 - 1 / self._longest:.0%}; "
                "--data.fit pad or stretch keeps all"
            )
        return tuple(lines)
