"""Writes the images beside it with Pillow, and what Pillow reads of lossy ones (*.rgb.png)."""

import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
HEIGHT, WIDTH = 40, 56

y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
rgb = np.stack(
    [127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 255 * (x + y) / (HEIGHT + WIDTH)],
    axis=-1,
).astype(np.uint8)
rgb[8:20, 10:30] = (200, 30, 40)
camera = Image.fromarray(rgb)
camera.save(HERE / "camera.png")
camera.convert("L").save(HERE / "gray.png")
alpha = camera.copy()
alpha.putalpha(Image.fromarray((x * 4).astype(np.uint8)))
alpha.save(HERE / "alpha.png")
camera.quantize(32).save(HERE / "palette.png")
camera.quantize(32).convert("RGB").save(HERE / "palette.rgb.png")

camera.save(HERE / "camera.jpg", quality=95)
camera.save(HERE / "progressive.jpg", quality=90, progressive=True)
camera.save(HERE / "full_chroma.jpg", quality=95, subsampling=0)
camera.convert("L").save(HERE / "gray.jpg", quality=95)
for name in ("camera", "progressive", "full_chroma", "gray"):
    Image.open(HERE / f"{name}.jpg").convert("RGB").save(HERE / f"{name}.jpg.rgb.png")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# 16 bits a channel: Pillow reads such a file but writes none.
deep = (rgb.astype(">u2") * 257).astype(">u2")
rows = b"".join(b"\0" + row.tobytes() for row in deep)
head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
(HERE / "deep.png").write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
)
