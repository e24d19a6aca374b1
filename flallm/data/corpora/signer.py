"""A procedural signer: the phonology of signs, and people who perform them as video.

A sign is described the way sign linguists do (Stokoe 1960; Battison 1978): handshape, orientation, place, movement, and
one hand, two symmetric hands, or a moving hand on a still base. A performance is a row of such signs with coarticulation:
the hands glide from where one sign ends to where the next begins. All lengths are in units of the frame's height, all
times in seconds; y points down, x to the viewer's right. The signer is right-handed: that hand is at the viewer's left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

FPS = 25

# Handshapes: how far thumb, index, middle, ring and little finger are stretched (0..1), and their spread.
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
# Places of articulation: from the middle between the shoulders, for the right hand.
MAX_POSITIONS = {
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

# A pose is one vector: x, y, angle, five fingers, spread of the right hand; the same of the left; head turn; brows.
HAND, LEFT, HEAD, BROWS, POSE = 9, 9, 18, 19, 20


@dataclass(frozen=True)
class Sign:
    """The form of one sign; `head` is a non-manual part: "shake" or "brows" or nothing."""

    handshape: str
    orientation: str
    place: str
    movement: str
    hands: str
    head: str = ""


def make_signs(count: int, seed: int) -> list[Sign]:
    """`count` different signs from the inventories above: every two of them differ in at least two features.

    So they share handshapes, places and movements as real signs do, yet no single detail decides alone.
    """
    rng = np.random.default_rng(seed)
    forms = list(itertools.product(HANDSHAPES, ORIENTATIONS, MAX_POSITIONS, MOVEMENTS, HANDS))
    signs: list[tuple[str, ...]] = []
    for i in rng.permutation(len(forms)):
        form = forms[i]
        low = form[2] in ("chest", "side", "low", "shoulder")
        if form[4] == "base" and form[2] not in ("chest", "low"):
            continue  # the base hand lies in front of the body
        if form[4] == "both" and not low and form[2] != "high":
            continue  # two hands at one face hide each other
        if all(sum(a != b for a, b in zip(form, other)) >= 2 for other in signs):
            signs.append(form)
        if len(signs) == count:
            return [Sign(*s) for s in signs]
    raise ValueError(f"the inventories do not hold {count} signs this different")


@dataclass(frozen=True)
class Signer:
    """How one person looks and moves, and where the camera finds them. Colours are RGB."""

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
    skins = [
        (255, 219, 190),
        (241, 194, 155),
        (224, 172, 125),
        (198, 134, 90),
        (141, 90, 58),
        (100, 62, 42),
    ]
    hairs = [
        (40, 30, 25),
        (90, 60, 35),
        (150, 105, 60),
        (215, 185, 110),
        (120, 120, 125),
        (150, 60, 35),
    ]
    skin = np.array(skins[rng.integers(len(skins))]) + rng.integers(-8, 9, 3)
    clothes = rng.integers(15, 130, 3)  # dark or strong, as in the studios: hands must stand out
    background = rng.integers(120, 236, 3)
    return Signer(
        skin=tuple(int(c) for c in np.clip(skin, 0, 255)),
        hair=hairs[rng.integers(len(hairs))],
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
    T = max(6, round(0.34 * FPS / signer.speed * rng.uniform(0.9, 1.15)))
    t = np.linspace(0, 1, T)
    size = rng.uniform(0.9, 1.15)
    poses = np.tile(_rest(signer), (T, 1))
    x, y = np.array(MAX_POSITIONS[sign.place]) + rng.normal(0, 0.008, 2)
    x *= signer.shoulders / 0.2
    right = poses[:, :HAND]
    right[:, 0], right[:, 1] = x, y
    right[:, 2] = ORIENTATIONS[sign.orientation] + rng.normal(0, 5)
    right[:, 3:] = HANDSHAPES[sign.handshape]
    glide, wave = (t - 0.5) * 0.2 * size, np.sin(2 * np.pi * t)
    moves = {  # what is added to x (0), y (1) or the angle (2)
        "down": {1: glide}, "up": {1: -glide}, "out": {0: -glide}, "in": {0: glide}, "shake": {0: 0.07 * size * wave}, "tap": {1: 0.07 * size * wave},
        "twist": {2: 50 * wave}, "circle": {0: 0.075 * size * wave, 1: 0.075 * size * np.cos(2 * np.pi * t)},
    }  # fmt: skip
    for axis, way in moves.get(sign.movement, {}).items():
        right[:, axis] += way
    if sign.movement == "open":
        right[:, 3:] = np.array(HANDSHAPES["fist"]) + t[:, None] * (
            right[:, 3:] - np.array(HANDSHAPES["fist"])
        )
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


def perform(
    signs: list[Sign], signer: Signer, rng: np.random.Generator, assimilation: float = 0.0
) -> np.ndarray:
    """A sentence as poses (T, POSE): rest, the signs with glides between them, rest.

    assimilation: the share of the way that the hands of a sign are drawn towards those of its neighbours, in place, orientation and shape; a second
    hand sinks where the neighbours have none.
    """
    rest = _rest(signer)[None]
    parts = [rest.repeat(2, 0)]
    segments = [_perform(sign, signer, rng) for sign in signs]
    means = [segment[:, :HEAD].mean(0) for segment in segments]
    for i, segment in enumerate(segments):
        if assimilation and (near := means[max(0, i - 1) : i] + means[i + 1 : i + 2]):
            segment[:, :HEAD] += assimilation * (np.mean(near, 0) - means[i])
    for segment in [*segments, rest]:
        a, b = parts[-1][-1], segment[0]
        n = max(3, round((0.10 + 0.20 * np.hypot(*(a[:2] - b[:2]))) * FPS / signer.speed))
        t = np.linspace(0, 1, n + 2)[1:-1, None]
        parts += [a + (b - a) * (t * t * (3 - 2 * t)), segment]  # slow start, slow end
    return np.concatenate(parts)


def render(
    poses: np.ndarray, signer: Signer, size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The poses as RGB frames (size, size, 3) uint8, with camera jitter and sensor noise."""
    canvas = _background(signer, size, rng)
    margin = (canvas.shape[0] - size) // 2
    noise = rng.normal(0, signer.noise, (2 * size, 2 * size, 1)).astype(np.int8).repeat(3, 2)
    shake = np.cumsum(rng.normal(0, signer.jitter, (len(poses), 2)), 0)
    shake -= np.linspace(0, 1, len(poses))[:, None] * shake[-1]  # the camera comes back
    for pose, offset in zip(poses, np.clip(shake, -0.03, 0.03)):
        dx, dy = (margin + np.round(offset * size)).astype(int)
        frame = np.ascontiguousarray(canvas[dy : dy + size, dx : dx + size])
        _draw(frame, pose, signer, offset)
        a, b = rng.integers(0, size, 2)
        yield cv2.add(frame, noise[a : a + size, b : b + size], dtype=cv2.CV_8U)


def _background(signer: Signer, size: int, rng: np.random.Generator) -> np.ndarray:
    side = size + 2 * max(2, round(0.04 * size))
    light = (
        np.linspace(1.06, 0.86, side)[:, None, None] * np.linspace(1.0, 0.94, side)[None, :, None]
    )
    image = np.clip(np.array(signer.background) * light, 0, 255).astype(np.uint8)
    image = np.ascontiguousarray(image)
    x, y = rng.uniform(0, 0.25), rng.uniform(0, 0.3)
    corner = int(x * side), int(y * side)
    cv2.rectangle(
        image,
        corner,
        (corner[0] + side // 6, corner[1] + side // 5),
        _shade(signer.background, 0.88),
        -1,
    )
    return image


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(int(min(255, c * factor)) for c in colour)


def _draw(frame: np.ndarray, pose: np.ndarray, signer: Signer, offset: np.ndarray) -> None:
    s = signer.scale * frame.shape[0]
    origin = (np.array([signer.x, signer.y]) - offset) * frame.shape[0]

    def at(x: float, y: float) -> np.ndarray:
        return origin + s * np.array([x, y])

    skin, dark = signer.skin, _shade(signer.skin, 0.62)
    w, head = signer.shoulders, signer.head
    torso = [
        (-0.05, -0.06),
        (0.05, -0.06),
        (w, 0.0),
        (w * 1.08, 0.1),
        (w * 0.85, 0.6),
        (-w * 0.85, 0.6),
        (-w * 1.08, 0.1),
        (-w, 0.0),
    ]
    face = at(pose[HEAD], -0.06 - 1.12 * head)
    if signer.long_hair:
        _ellipse(
            frame,
            face + s * np.array([0, 0.35 * head]),
            1.12 * head * s,
            1.35 * head * s,
            signer.hair,
        )
    _line(frame, at(0, -0.14), at(0, -0.02), 0.085 * s, dark)  # neck
    _polygon(frame, [at(*p) for p in torso], signer.clothes)
    _ellipse(
        frame, face - s * np.array([0, 0.22 * head]), 1.02 * head * s, 1.05 * head * s, signer.hair
    )
    _ellipse(frame, face + s * np.array([0, 0.1 * head]), 0.86 * head * s, 1.05 * head * s, skin)
    turn = 0.6 * pose[HEAD]
    for side in (-1, 1):
        eye = face + s * np.array([0.36 * head * side + turn, -0.08 * head])
        _ellipse(frame, eye, 0.11 * head * s, 0.12 * head * s, (30, 25, 25))
        brow = eye - s * np.array([0, (0.28 + 0.2 * pose[BROWS]) * head])
        _line(
            frame,
            brow - [0.16 * head * s, 0],
            [*brow, 0.16 * head * s, 0],
            0.08 * head * s,
            signer.hair,
        )
    _line(
        frame,
        face + s * np.array([turn - 0.2 * head, 0.62 * head]),
        face + s * np.array([turn + 0.2 * head, 0.62 * head]),
        0.1 * head * s,
        (170, 80, 80),
    )
    for side, hand in ((1, pose[LEFT : LEFT + HAND]), (-1, pose[:HAND])):
        shoulder, palm = at(side * w * 0.93, 0.04), at(hand[0], hand[1])
        angle = np.deg2rad(hand[2])
        finger = (
            np.array([-side * np.sin(angle), -np.cos(angle)])
            if side < 0
            else np.array([np.sin(angle), -np.cos(angle)])
        )
        wrist = palm - 0.9 * signer.hand * s * finger
        elbow = _elbow(shoulder, wrist, 0.25 * s, 0.25 * s, side)
        sleeve = _shade(signer.clothes, 0.8)
        _line(frame, shoulder, elbow, 0.085 * s, sleeve)
        _line(frame, elbow, elbow + 0.75 * (wrist - elbow), 0.075 * s, sleeve)
        _line(frame, elbow + 0.75 * (wrist - elbow), wrist, 0.05 * s, skin)
        _hand(frame, palm, finger, hand[3:], signer.hand * s, side, skin, dark)


def _hand(frame, palm, finger, shape, radius, side, skin, dark) -> None:
    """Palm and fingers, first as a dark outline, then in skin colour, so that fingers stand apart."""
    across = np.array([-finger[1], finger[0]]) * -side  # towards the thumb
    tips = []
    for k, stretch in enumerate(shape[:5]):
        if k == 0:  # thumb
            direction = across * (0.6 + 0.4 * stretch) + finger * 0.45
            base, length = palm + across * radius * 0.5, radius * (0.55 + 0.95 * stretch)
        else:
            fan = (2.5 - k) * 0.42 * shape[5]
            direction = finger * np.cos(fan) + across * np.sin(fan)
            base, length = (
                palm + across * radius * 0.42 * (2.5 - k),
                radius * (0.75 + 1.55 * stretch),
            )
        tips.append((base, base + direction * length))
    edge = max(1.0, 0.22 * radius)
    for grow, colour in ((2 * edge, dark), (0, skin)):
        _ellipse(frame, palm, radius + grow / 2, radius + grow / 2, colour)
        for base, tip in tips:
            _line(frame, base, tip, 0.46 * radius + grow, colour)


def _elbow(shoulder, wrist, upper, fore, side) -> np.ndarray:
    """Two-bone inverse kinematics: where the elbow is, bent outwards and down."""
    d = wrist - shoulder
    distance = max(1e-6, float(np.hypot(*d)))
    reach = min(distance, 0.999 * (upper + fore))
    along = (upper**2 - fore**2 + reach**2) / (2 * reach)
    height = np.sqrt(max(0.0, upper**2 - along**2))
    unit = d / distance
    normal = np.array([-unit[1], unit[0]])
    if normal[0] * side + normal[1] < 0:
        normal = -normal
    return shoulder + unit * along * distance / reach + normal * height


# OpenCV draws between pixels when coordinates carry `SHIFT` fractional bits.
SHIFT = 4


def _fixed(p) -> tuple[int, int]:
    return int(p[0] * (1 << SHIFT)), int(p[1] * (1 << SHIFT))


def _line(frame, a, b, width: float, colour) -> None:
    cv2.line(frame, _fixed(a), _fixed(b), colour, max(1, round(width)), cv2.LINE_AA, SHIFT)


def _ellipse(frame, centre, rx: float, ry: float, colour) -> None:
    cv2.ellipse(frame, _fixed(centre), _fixed((rx, ry)), 0, 0, 360, colour, -1, cv2.LINE_AA, SHIFT)


def _polygon(frame, points, colour) -> None:
    cv2.fillPoly(
        frame, [np.array([_fixed(p) for p in points], np.int32)], colour, cv2.LINE_AA, SHIFT
    )
