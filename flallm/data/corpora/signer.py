"""A procedural signer: the phonology of signs, and people who perform them as video.

Signs are described as linguists describe them (Stokoe 1960; Battison 1978): handshape, orientation,
place, movement, and one hand, two symmetric hands, or a moving hand on a still base. A performance
is a row of such signs with coarticulation: the hands glide from where one sign ends to where the
next begins. Lengths are in units of the frame's height, times in seconds; y points down, x to the
viewer's right. The signer is right-handed: that hand is at the viewer's left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

FPS = 25

# How far thumb, index, middle, ring and little finger are stretched (0 to 1), and their spread.
HANDSHAPES = {
    "fist": (0.1, 0, 0, 0, 0, 0.2),
    "index": (0.1, 1, 0, 0, 0, 0.2),
    "vee": (0.1, 1, 1, 0, 0, 1.0),
    "flat": (0.3, 1, 1, 1, 1, 0.15),
    "five": (1, 1, 1, 1, 1, 1.0),
    "claw": (0.6, 0.55, 0.55, 0.55, 0.55, 1.1),
    "horns": (0.1, 1, 0, 0, 1, 0.8),
    "ell": (1, 1, 0, 0, 0, 0.6),
    "wye": (1, 0, 0, 0, 1, 1.2),
    "three": (1, 1, 1, 0, 0, 0.9),
}
# Where the finger tips point, in degrees from straight up, towards the other hand.
ORIENTATIONS = {"up": 0, "in": 70, "down": 165, "out": -50}
# Places of articulation of the right hand, from the middle between the shoulders.
PLACES = {
    "forehead": (-0.07, -0.29),
    "cheek": (-0.14, -0.17),
    "chin": (-0.01, -0.09),
    "shoulder": (-0.17, 0.04),
    "chest": (-0.05, 0.15),
    "side": (-0.30, 0.16),
    "high": (-0.33, -0.16),
    "low": (-0.12, 0.36),
}
MOVEMENTS = ("hold", "down", "up", "out", "in", "circle", "shake", "tap", "twist", "open")
HANDS = ("one", "both", "base")
SKINS = [
    (255, 219, 190),
    (241, 194, 155),
    (224, 172, 125),
    (198, 134, 90),
    (141, 90, 58),
    (100, 62, 42),
]
HAIRS = [
    (40, 30, 25),
    (90, 60, 35),
    (150, 105, 60),
    (215, 185, 110),
    (120, 120, 125),
    (150, 60, 35),
]

# A pose is a vector: x, y, angle, five fingers and spread of the right hand; the same of the left
# hand; the turn of the head; the brows.
HAND = 9  # numbers of a hand
LEFT, HEAD, BROWS = 9, 18, 19  # where they begin
POSE = 20


@dataclass(frozen=True)
class Sign:
    """The form of one sign. head: the non-manual part, "shake", "brows" or ""."""

    handshape: str
    orientation: str
    place: str
    movement: str
    hands: str
    head: str = ""


def make_signs(count: int, seed: int) -> list[Sign]:
    """`count` different signs from the inventories above, any two different in two features.

    So they share handshapes, places and movements as real signs do, yet no single detail decides.
    """
    rng = np.random.default_rng(seed)
    forms = list(itertools.product(HANDSHAPES, ORIENTATIONS, PLACES, MOVEMENTS, HANDS))
    signs: list[tuple[str, ...]] = []
    for i in rng.permutation(len(forms)):
        form = forms[i]
        _, _, place, _, hands = form
        if hands == "base" and place not in ("chest", "low"):
            continue  # the base hand lies in front of the body
        if hands == "both" and place in ("forehead", "cheek", "chin"):
            continue  # two hands at one face hide each other
        if all(_num_differences(form, other) >= 2 for other in signs):
            signs.append(form)
        if len(signs) == count:
            return [Sign(*features) for features in signs]
    raise ValueError(f"the inventories do not hold {count} signs this different")


def _num_differences(form: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(feature != other_feature for feature, other_feature in zip(form, other))


@dataclass(frozen=True)
class Signer:
    """How a person looks and moves, and where the camera sees them. Colours are RGB."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    clothes: tuple[int, int, int]
    background: tuple[int, int, int]
    shoulders: float  # half the shoulder width
    head: float  # radius of the head
    hand: float  # radius of the palm
    speed: float  # signs are performed this much faster than usual
    x: float  # middle between the shoulders
    y: float
    scale: float
    long_hair: bool
    jitter: float  # of the camera
    noise: float  # of the sensor, in grey levels


def make_signer(seed: int) -> Signer:
    rng = np.random.default_rng([seed, 77])
    skin = np.array(SKINS[rng.integers(len(SKINS))]) + rng.integers(-8, 9, 3)
    clothes = rng.integers(15, 130, 3)  # dark or strong, as in studios, so hands stand out
    background = rng.integers(120, 236, 3)
    return Signer(
        skin=tuple(int(c) for c in np.clip(skin, 0, 255)),
        hair=HAIRS[rng.integers(len(HAIRS))],
        clothes=tuple(int(c) for c in clothes),
        background=tuple(int(c) for c in background),
        shoulders=rng.uniform(0.18, 0.23),
        head=rng.uniform(0.105, 0.125),
        hand=rng.uniform(0.060, 0.068),
        speed=rng.uniform(0.88, 1.15),
        x=0.5 + rng.uniform(-0.04, 0.04),
        y=0.53 + rng.uniform(-0.03, 0.03),
        scale=rng.uniform(1.04, 1.16),
        long_hair=bool(rng.integers(2)),
        jitter=rng.uniform(0.001, 0.005),
        noise=rng.uniform(0.5, 2.5),
    )


def _rest(signer: Signer) -> np.ndarray:
    """The pose between sentences: both hands low in front of the body."""
    pose = np.zeros(POSE)
    pose[:HAND] = (-0.13, 0.50, 60, *HANDSHAPES["flat"])
    pose[LEFT : LEFT + HAND] = (0.13, 0.50, -60, *HANDSHAPES["flat"])
    return pose


def _perform(sign: Sign, signer: Signer, rng: np.random.Generator) -> np.ndarray:
    """One sign as poses (T, POSE), with the variation of a single performance."""
    num_frames = max(6, round(0.34 * FPS / signer.speed * rng.uniform(0.9, 1.15)))
    t = np.linspace(0, 1, num_frames)
    size = rng.uniform(0.9, 1.15)
    poses = np.tile(_rest(signer), (num_frames, 1))
    x, y = np.array(PLACES[sign.place]) + rng.normal(0, 0.008, 2)
    x *= signer.shoulders / 0.2
    right = poses[:, :HAND]
    right[:, 0], right[:, 1] = x, y
    right[:, 2] = ORIENTATIONS[sign.orientation] + rng.normal(0, 5)
    right[:, 3:] = HANDSHAPES[sign.handshape]
    _move(right, sign.movement, t, size)
    left = poses[:, LEFT : LEFT + HAND]
    if sign.hands == "both":
        left[:] = right
        left[:, 0], left[:, 2] = -right[:, 0], -right[:, 2]
    elif sign.hands == "base":
        left[:] = (0.03, y + 0.10, -80, *HANDSHAPES["flat"])
    if sign.head == "shake":
        poses[:, HEAD] = 0.035 * np.sin(3 * np.pi * t)
    if sign.head == "brows":
        poses[:, BROWS] = 1
    return poses


def _move(hand: np.ndarray, movement: str, t: np.ndarray, size: float) -> None:
    """Adds a movement to the poses of a hand (T, HAND), in place. t: (T,) from 0 to 1."""
    x, y, angle = hand[:, 0], hand[:, 1], hand[:, 2]
    glide, wave = (t - 0.5) * 0.2 * size, np.sin(2 * np.pi * t)
    match movement:
        case "down":
            y += glide
        case "up":
            y -= glide
        case "out":
            x -= glide
        case "in":
            x += glide
        case "shake":
            x += 0.07 * size * wave
        case "tap":
            y += 0.07 * size * wave
        case "twist":
            angle += 50 * wave
        case "circle":
            x += 0.075 * size * wave
            y += 0.075 * size * np.cos(2 * np.pi * t)
        case "open":
            fist = np.array(HANDSHAPES["fist"])
            hand[:, 3:] = fist + t[:, None] * (hand[:, 3:] - fist)


def perform(
    signs: list[Sign], signer: Signer, rng: np.random.Generator, assimilation: float = 0.0
) -> np.ndarray:
    """A sentence as poses (T, POSE): rest, the signs with glides between them, rest.

    assimilation: the share of the way that the hands of a sign are drawn towards those of its
    neighbours, in place, orientation and shape. A second hand sinks where the neighbours have none.
    """
    rest = _rest(signer)[None]
    segments = [_perform(sign, signer, rng) for sign in signs]
    if assimilation:
        _assimilate(segments, assimilation)
    parts = [rest.repeat(2, 0)]
    for segment in [*segments, rest]:
        begin, end = parts[-1][-1], segment[0]
        distance = np.hypot(*(begin[:2] - end[:2]))
        num_frames = max(3, round((0.10 + 0.20 * distance) * FPS / signer.speed))
        t = np.linspace(0, 1, num_frames + 2)[1:-1, None]
        glide = begin + (end - begin) * (t * t * (3 - 2 * t))  # slow start, slow end
        parts += [glide, segment]
    return np.concatenate(parts)


def _assimilate(segments: list[np.ndarray], share: float) -> None:
    """Draws the hands of each sign towards the means of its neighbours, in place."""
    means = [segment[:, :HEAD].mean(0) for segment in segments]
    for i, segment in enumerate(segments):
        neighbours = means[max(0, i - 1) : i] + means[i + 1 : i + 2]
        if neighbours:
            segment[:, :HEAD] += share * (np.mean(neighbours, 0) - means[i])
