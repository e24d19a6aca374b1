"""Draws the poses of a procedural signer (`signer.py`) as video."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from flallm.data.corpora.signer import BROWS, HAND, HEAD, LEFT, Signer

# The right side of the torso from the shoulder down: x in half shoulder widths, y.
TORSO = [(1.0, 0.0), (1.08, 0.1), (0.85, 0.6)]
SHADE = 0.62  # of the skin in the shadow
SHIFT = 4  # fractional bits of coordinates


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
    """A wall with a frame on it, larger than the picture by the way the camera moves."""
    side = size + 2 * max(2, round(0.04 * size))
    light = np.linspace(1.06, 0.86, side)[:, None, None]
    light = light * np.linspace(1.0, 0.94, side)[None, :, None]
    image = np.clip(np.array(signer.background) * light, 0, 255).astype(np.uint8)
    image = np.ascontiguousarray(image)
    x, y = rng.uniform(0, 0.25), rng.uniform(0, 0.3)
    left, top = int(x * side), int(y * side)
    corner = (left + side // 6, top + side // 5)
    cv2.rectangle(image, (left, top), corner, _shade(signer.background, 0.88), -1)
    return image


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(int(min(255, c * factor)) for c in colour)


def _draw(frame: np.ndarray, pose: np.ndarray, signer: Signer, offset: np.ndarray) -> None:
    """Draws a pose into a frame (size, size, 3). offset: (x, y) of the camera."""
    scale = signer.scale * frame.shape[0]  # pixels of a unit of length
    origin = (np.array([signer.x, signer.y]) - offset) * frame.shape[0]

    def at(x: float, y: float) -> np.ndarray:
        return origin + scale * np.array([x, y])

    face = at(pose[HEAD], -0.06 - 1.12 * signer.head)
    if signer.long_hair:
        radius = scale * signer.head
        behind = face + scale * np.array([0, 0.35 * signer.head])
        _ellipse(frame, behind, 1.12 * radius, 1.35 * radius, signer.hair)
    neck = _shade(signer.skin, SHADE)
    _line(frame, at(0, -0.14), at(0, -0.02), 0.085 * scale, neck)
    right_side = [(x * signer.shoulders, y) for x, y in TORSO]
    left_side = [(-x, y) for x, y in reversed(right_side)]
    torso = [(-0.05, -0.06), (0.05, -0.06), *right_side, *left_side]
    _polygon(frame, [at(x, y) for x, y in torso], signer.clothes)
    _draw_face(frame, face, pose, signer, scale)
    for side, hand in ((1, pose[LEFT : LEFT + HAND]), (-1, pose[:HAND])):
        shoulder = at(side * signer.shoulders * 0.93, 0.04)
        _draw_arm(frame, shoulder, at(hand[0], hand[1]), hand, side, signer, scale)


def _draw_face(
    frame: np.ndarray, face: np.ndarray, pose: np.ndarray, signer: Signer, scale: float
) -> None:
    """Draws the head. face: (x, y) of its middle in pixels."""
    radius = scale * signer.head
    hair = face - scale * np.array([0, 0.22 * signer.head])
    _ellipse(frame, hair, 1.02 * radius, 1.05 * radius, signer.hair)
    skin = face + scale * np.array([0, 0.1 * signer.head])
    _ellipse(frame, skin, 0.86 * radius, 1.05 * radius, signer.skin)
    turn = 0.6 * pose[HEAD]
    for side in (-1, 1):
        eye = face + scale * np.array([0.36 * signer.head * side + turn, -0.08 * signer.head])
        _ellipse(frame, eye, 0.11 * radius, 0.12 * radius, (30, 25, 25))
        brow = eye - scale * np.array([0, (0.28 + 0.2 * pose[BROWS]) * signer.head])
        _line(frame, brow - [0.16 * radius, 0], brow, 0.08 * radius, signer.hair)
    mouth_left = face + scale * np.array([turn - 0.2 * signer.head, 0.62 * signer.head])
    mouth_right = face + scale * np.array([turn + 0.2 * signer.head, 0.62 * signer.head])
    _line(frame, mouth_left, mouth_right, 0.1 * radius, (170, 80, 80))


def _draw_arm(
    frame: np.ndarray,
    shoulder: np.ndarray,
    palm: np.ndarray,
    hand: np.ndarray,
    side: int,
    signer: Signer,
    scale: float,
) -> None:
    """Draws an arm. hand: (HAND,) of the pose. side: 1 is the viewer's right, -1 the left."""
    angle = np.deg2rad(hand[2])
    direction = np.array([np.sin(angle), -np.cos(angle)])  # of the fingers
    wrist = palm - 0.9 * signer.hand * scale * direction
    elbow = _elbow(shoulder, wrist, 0.25 * scale, 0.25 * scale, side)
    sleeve = _shade(signer.clothes, 0.8)
    cuff = elbow + 0.75 * (wrist - elbow)
    _line(frame, shoulder, elbow, 0.085 * scale, sleeve)
    _line(frame, elbow, cuff, 0.075 * scale, sleeve)
    _line(frame, cuff, wrist, 0.05 * scale, signer.skin)
    _draw_hand(frame, palm, direction, hand[3:], side, signer, scale)


def _draw_hand(
    frame: np.ndarray,
    palm: np.ndarray,
    direction: np.ndarray,
    shape: np.ndarray,
    side: int,
    signer: Signer,
    scale: float,
) -> None:
    """Draws palm and fingers, first as a dark outline, so that fingers stand apart.

    direction: (x, y) of the fingers. shape: the stretch of the five fingers, and their spread.
    """
    radius = signer.hand * scale
    across = np.array([-direction[1], direction[0]]) * -side  # towards the thumb
    fingers = []  # (base, tip) of each
    for number, stretch in enumerate(shape[:5]):
        if number == 0:  # the thumb
            way = across * (0.6 + 0.4 * stretch) + direction * 0.45
            base = palm + across * radius * 0.5
            length = radius * (0.55 + 0.95 * stretch)
        else:
            fan = (2.5 - number) * 0.42 * shape[5]
            way = direction * np.cos(fan) + across * np.sin(fan)
            base = palm + across * radius * 0.42 * (2.5 - number)
            length = radius * (0.75 + 1.55 * stretch)
        fingers.append((base, base + way * length))
    edge = max(1.0, 0.22 * radius)
    for grow, colour in ((2 * edge, _shade(signer.skin, SHADE)), (0, signer.skin)):
        _ellipse(frame, palm, radius + grow / 2, radius + grow / 2, colour)
        for base, tip in fingers:
            _line(frame, base, tip, 0.46 * radius + grow, colour)


def _elbow(
    shoulder: np.ndarray, wrist: np.ndarray, upper: float, fore: float, side: int
) -> np.ndarray:
    """Where the elbow is, bent outwards and down (two-bone inverse kinematics).

    upper, fore: lengths of the arm's bones.
    """
    way = wrist - shoulder
    distance = max(1e-6, float(np.hypot(*way)))
    reach = min(distance, 0.999 * (upper + fore))
    along = (upper**2 - fore**2 + reach**2) / (2 * reach)
    height = np.sqrt(max(0.0, upper**2 - along**2))
    unit = way / distance
    normal = np.array([-unit[1], unit[0]])
    if normal[0] * side + normal[1] < 0:
        normal = -normal
    return shoulder + unit * along * distance / reach + normal * height


def _fixed(point) -> tuple[int, int]:
    """OpenCV draws between pixels when coordinates carry SHIFT fractional bits."""
    return int(point[0] * (1 << SHIFT)), int(point[1] * (1 << SHIFT))


def _line(frame, begin, end, width: float, colour) -> None:
    thickness = max(1, round(width))
    cv2.line(frame, _fixed(begin), _fixed(end), colour, thickness, cv2.LINE_AA, SHIFT)


def _ellipse(frame, centre, rx: float, ry: float, colour) -> None:
    axes = _fixed((rx, ry))
    cv2.ellipse(frame, _fixed(centre), axes, 0, 0, 360, colour, -1, cv2.LINE_AA, SHIFT)


def _polygon(frame, points, colour) -> None:
    corners = np.array([_fixed(point) for point in points], np.int32)
    cv2.fillPoly(frame, [corners], colour, cv2.LINE_AA, SHIFT)
