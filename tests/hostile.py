"""Hostile requests to a server of predict.py --serve: what they do to its answers, memory and error output.

    python tests/hostile.py out/uniter-vqa/best.pt --count 500

`make_request` draws one: the parts to send, seconds between them, and how the connection ends. tests/test_serve.py sends
fifty of them.
"""

import argparse
import base64
import http.client
import io
import json
import re
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

# ---- contents ----------------------------------------------------------------------------------------------------------


def png_bomb(width, height, depth=8, color=0):
    """A whole PNG of zeros, small as a file: its rows are compressed a thousandfold. color 0 is grey, 2 RGB, 6 RGBA."""
    bits = depth * {0: 1, 2: 3, 6: 4}[color]
    row = bytes(1 + (width * bits + 7) // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png_of(width, height, depth, color, rows)


def png_of(width, height, depth, color, rows):
    """A PNG of these compressed rows, which may be wrong."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def zip_bomb():
    """An .npz with an array of 256 MiB of zeros in a quarter of a MiB."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", bytes(2**28))
    return content.getvalue()


def small_picture(kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(content, kind)
    return content.getvalue()


def text_chunk_bomb():
    """A PNG whose comment is 200 MiB long when it is unpacked."""
    text = b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    picture = small_picture()
    return picture[:33] + chunk + picture[33:]  # after the header


BOMBS = {}  # name -> bytes, made once


def bomb(name):
    """A picture, or something that claims to be one, that is far larger in memory than as a file."""
    makers = {
        "50,000 x 50,000": lambda: png_of(50_000, 50_000, 8, 2, zlib.compress(bytes(2**20), 9)),
        "65,535 x 65,535": lambda: png_of(65_535, 65_535, 1, 0, b""),
        "12 million pixels": lambda: png_bomb(4_000, 3_000, 8, 2),
        "6 million pixels with transparency": lambda: png_bomb(3_000, 2_000, 8, 6),
        "12 million pixels of 16 bits": lambda: png_bomb(4_000, 3_000, 16, 0),
        "3 million pixels of 16 bits": lambda: png_bomb(2_000, 1_500, 16, 0),
        "one row": lambda: png_bomb(12_000_000, 1, 8, 0),
        "a long side": lambda: png_bomb(20_000, 600, 8, 0),
        "comment": text_chunk_bomb,
        "npz": zip_bomb,
    }
    if name is None:
        return list(makers)
    if name not in BOMBS:
        BOMBS[name] = makers[name]()
    return BOMBS[name]


# ---- requests ----------------------------------------------------------------------------------------------------------


def request(body=b"", method="POST", path="/predict", headers=(), length=None):
    """The bytes of a request. headers: lines. length: of the header Content-Length, in place of the right one."""
    lines = [f"{method} {path} HTTP/1.1"]
    if not any(line.startswith("Host") for line in headers):
        lines.append("Host: 127.0.0.1")
    lines += headers
    if length is None:
        length = len(body)
    if length is not False:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def question(**keys):
    """The body of a question that is right but for `keys`."""
    picture = base64.b64encode(small_picture()).decode()
    return json.dumps({"text": "what is it?", "images": [picture], **keys}).encode()


def form(*parts, boundary="XX", end=True):
    """A request with a form. parts: (disposition, content)."""
    body = b""
    for disposition, content in parts:
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    if end:
        body += f"--{boundary}--\r\n".encode()
    return request(body, headers=[f"Content-Type: multipart/form-data; boundary={boundary}"])


def broken_form(rng):
    whole = form(('form-data; name="image"; filename="a.png"', small_picture()), ('form-data; name="text"', b"what?"))
    _, _, body = whole.partition(b"\r\n\r\n")
    kind = ["Content-Type: multipart/form-data; boundary=XX"]
    choices = [
        lambda: request(body[: rng.integers(len(body))], headers=kind),
        lambda: request(body, headers=["Content-Type: multipart/form-data"]),
        lambda: request(body, headers=["Content-Type: multipart/form-data; boundary=" + "x" * 5000]),
        lambda: request(body, headers=["Content-Type: multipart/form-data; boundary*=utf-8''%00%ff"]),
        lambda: request(body, headers=['Content-Type: multipart/form-data; boundary="']),
        lambda: request(b"--XX" * 100_000, headers=kind),
        lambda: request(b"\r\n--XX\r\n" * 100_000, headers=kind),
        lambda: request(b"\r\n" * 2_000_000, headers=kind),
        lambda: form(*[('form-data; name="text"', b"x")] * 1000),
        lambda: form(("form-data; name*=utf-8''%ff", b"x"), ("form-data; name", b"x"), ("", b"x")),
        lambda: form(('form-data; name="text"', b"\xff\xfe"), ('form-data; name="boxes"', b"[[[[")),
        lambda: form(('form-data; name="sample"', b"9" * 400)),
        lambda: form(('form-data; name="image"; filename="../../etc/passwd"', b"x"), ('form-data; name="text"', b"x")),
        lambda: form(('form-data; name="image"\r\nContent-Transfer-Encoding: base64', b"%%"), end=False),
        lambda: form(('form-data; name="image"\r\n' + "A: b\r\n" * 20_000, small_picture())),
    ]
    return choices[rng.integers(len(choices))]()


def wrong_value(rng):
    values = [
        None,
        True,
        -1,
        0,
        3.5,
        1e308,
        float("nan"),
        int("9" * 400),
        "",
        "\0",
        "\ud83d",
        "x" * 100_000,
        [],
        {},
        [[]],
        [None],
    ]
    values += [[{}], {"a": [1]}, [[[0, 0, 0, 0]]], [[[5, 5, 1, 1]]], [[[0, 0, int("9" * 400), 9]]], [[["a", 0, 1, 1]]]]
    keys = ["text", "images", "boxes", "choices", "answer", "sample", "attention"]
    wrong = {keys[i]: values[rng.integers(len(values))] for i in rng.integers(len(keys), size=2)}
    return request(question(**wrong))


def wrong_json(rng):
    choices = [
        b"[" * 100_000,
        b'{"a":' * 15_000,
        b"[" * 15_000,
        b"[" + b"{}," * 2_000_000 + b"0]",
        b"[" + b"1," * 4_000_000 + b"0]",
        b'{"text": ' + b"9" * 100_000 + b"}",
        b'"' + b"\\u0000" * 100_000 + b'"',
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"{" + b" " * 4_000_000,
        bytes(1000),
        rng.bytes(3000),
    ]
    return request(choices[rng.integers(len(choices))])


def bomb_request(rng):
    names = bomb(None)
    content = bomb(names[rng.integers(len(names))])
    if rng.random() < 0.5:
        return form(('form-data; name="image"', content), ('form-data; name="text"', b"what is it?"))
    return request(question(images=[base64.b64encode(content).decode()]))


def damaged_picture(rng):
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA"]
    content = bytearray(small_picture(kinds[rng.integers(len(kinds))]))
    for i in rng.integers(len(content), size=5):
        content[i] = rng.integers(256)
    content = bytes(content[: rng.integers(len(content)) + 1])
    if rng.random() < 0.2:
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n"
    return request(question(images=[base64.b64encode(content).decode()]))


def wrong_path(rng):
    paths = [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "http://127.0.0.1/",
        "http://evil.test/predict",
        "//etc/passwd",
        "*",
    ]
    paths += [
        "/samples/../serve.py",
        "/" + "a" * 70_000,
        "/\0",
        "/\xff",
        "/predict/../predict",
        "/predict%00",
        "/..\\..\\x",
        "?",
    ]
    method = ["GET", "POST"][rng.integers(2)]
    return request(question(), method=method, path=paths[rng.integers(len(paths))])


def wrong_method(rng):
    methods = [
        "PUT",
        "DELETE",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        "HEAD",
        "get",
        "G" * 10_000,
        "\0",
        "__init__",
        "send_error",
        "ERROR",
    ]
    return request(question(), method=methods[rng.integers(len(methods))])


def wrong_header(rng):
    body = question()
    choices = [
        lambda: request(body, headers=["A: " + "b" * 100_000]),
        lambda: request(body, headers=["A: b"] * 300),
        lambda: request(body, headers=["A: " + "b" * 60_000] * 90),
        lambda: request(body, headers=["Host: evil.test"]),
        lambda: request(body, headers=["Host: 127.0.0.1.evil.test:80"]),
        lambda: request(body, headers=["Host: 127.0.0.1", "Host: evil.test"]),
        lambda: request(body, headers=["Host: "]),
        lambda: request(body, headers=["Host: [::1]:99"]),
        lambda: request(body, headers=["Origin: http://evil.test"]),
        lambda: request(body, headers=["Origin: null"]),
        lambda: request(body, headers=["\0: \0", "no colon", ": no name", " folded"]),
        lambda: request(body, headers=["Content-Type: \xff; boundary=\xff"]),
        lambda: request(body, headers=["Expect: 100-continue"] * 3),
        lambda: request(body, headers=["Transfer-Encoding: chunked"], length=False),
        lambda: request(b"5\r\nhello\r\n0\r\n\r\n", headers=["Transfer-Encoding: chunked"]),
        lambda: request(body, headers=["Upgrade: websocket", "Connection: Upgrade"]),
    ]
    return choices[rng.integers(len(choices))]()


def wrong_length(rng):
    lengths = [0, -1, 1, 10**5, 10**9, "9" * 400, "", "abc", "1e3", "0x10", "+5", "5 5", "\xb2", False]
    return request(question(), length=lengths[rng.integers(len(lengths))])


def noise(rng):
    choices = [
        rng.bytes(2000) + b"\r\n\r\n",
        b"\r\n" * 1000,
        b"GET /\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"",
    ]
    choices += [
        b"GET / HTTP/1.1 extra\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\n\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    return choices[rng.integers(len(choices))]


def pipelined(rng):
    return (request(method="GET", path="/healthz") + request(question())) * int(rng.integers(1, 50))


KINDS = (
    broken_form,
    wrong_value,
    wrong_json,
    bomb_request,
    damaged_picture,
    wrong_path,
    wrong_method,
    wrong_header,
    wrong_length,
    noise,
    pipelined,
)


def make_request(seed, pause):
    """(name, parts to send, seconds between parts, how it ends) of hostile request number `seed`."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    content = kind(rng)
    ending = ["read", "read", "read", "half-closed", "closed", "reset"][rng.integers(6)]
    if rng.random() < 0.1 and len(content) > 10:  # a slow writer, byte by byte
        return f"slow {kind.__name__}", [content[i : i + 1] for i in range(40)], pause, ending
    return kind.__name__, [content], 0, ending


def send(port, parts, pause, ending, seconds=60):
    """Sends one request. Returns the status, or a word if there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
            if ending == "closed":
                return "closed by the client"
            if ending == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "reset by the client"
            if ending == "half-closed":
                client.shutdown(socket.SHUT_WR)
            reply = b""
            while b"\r\n" not in reply:
                part = client.recv(65536)
                if not part:
                    return "no answer"
                reply += part
        except TimeoutError:
            return "no answer in time"
        except OSError:
            return "connection lost"
    found = re.match(rb"HTTP/1\.[01] (\d+)", reply)
    return int(found[1]) if found else "an answer without a status"


# ---- against a server of its own ---------------------------------------------------------------------------------------


def peak_memory(pid):
    """Most MiB that a process had in memory so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def healthy(port):
    """Whether the server answers a question about a picture."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", question(boxes=[[[0, 0, 32, 32]]]))
    return connection.getresponse().status == 200


def main():
    parser = argparse.ArgumentParser(description="Send hostile requests to a server of its own.")
    parser.add_argument("checkpoint")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--threads", type=int, default=16, help="requests at the same time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    program = Path(__file__).parent.parent / "predict.py"
    command = [sys.executable, str(program), args.checkpoint, "--serve", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)\n", process.stdout.readline())[1])
    assert healthy(port)
    before = peak_memory(process.pid)
    start = time.monotonic()

    def attack(seed):
        name, *how = make_request(seed, pause=1.0)
        return name, send(port, *how)

    with ThreadPoolExecutor(args.threads) as pool:
        found = list(pool.map(attack, range(args.seed, args.seed + args.count)))
    seconds = time.monotonic() - start
    after = peak_memory(process.pid)
    alive = healthy(port)
    process.terminate()
    out, errors = process.communicate(timeout=60)
    for status, count in sorted(Counter(str(status) for _, status in found).items()):
        print(f"{count:5d}  {status}")
    for name, status in found:
        if status == 500 or status == "no answer in time" or (status == "connection lost" and "slow" not in name):
            print(f"       {status}: {name}")
    print(f"{args.count} requests in {seconds:.0f} s; answers afterwards: {alive}; exit code {process.returncode}")
    print(f"most memory: {before:.0f} MiB before, {after:.0f} MiB after: +{after - before:.0f}")
    print(f"printed by the server: {out.strip()!r}; on stderr: {errors.strip()[-2000:]!r}")


if __name__ == "__main__":
    main()
