"""Download a file so that it is complete and correct, or not there at all.

The bytes that have arrived wait in NAME.part, and the next attempt asks for the rest (HTTP Range).
"""

import os
import time
from configurator import UserError, one_line
from contextlib import suppress
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from support.files import file_sha256, lock_path, replace

TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt; doubles before every further one
LONGEST_WAIT = 600.0  # seconds, while another process downloads the same file
LONGEST_PAUSE = 60.0  # seconds, even if the server asks for more
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
MOST_BYTES = 20 << 30  # no file that this project needs is larger


class NotFound(UserError):
    """The server answers, but it has no such file."""


class TryAgain(Exception):
    seconds = 0.0  # the pause before the next attempt that the server asks for


def hub_url(path: str) -> str:
    """Return the address of a file on the Hugging Face hub, or on the mirror HF_ENDPOINT."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def download(url: str, path: Path, sha256: str = "", size: int = 0, tries: int = 5) -> None:
    """Download `url` to `path`, which appears when the file is complete.

    Checks the length, and the sha256 if it is given here or by the hub. `size`: expected length.
    Interrupted downloads resume. Raises UserError after `tries` attempts without a new byte.
    """
    part, missing = path.with_name(path.name + ".part"), not path.exists()
    with lock_path(path, LONGEST_WAIT), open_session(url) as session:
        if missing and path.exists():  # another process has brought it meanwhile
            return
        failures, most = 0, part.stat().st_size if part.exists() else 0
        while failures < tries:
            try:
                fetch_rest(session, url, part, sha256, size)
                replace(part, path)
                return
            except (requests.RequestException, urllib3.exceptions.HTTPError, TryAgain) as error:
                reason, asked = short_reason(error), getattr(error, "seconds", 0)
            have = part.stat().st_size if part.exists() else 0
            failures = 0 if have > most else failures + 1
            most = max(most, have)
            if 0 < failures < tries:
                pause = min(max(asked, PAUSE * 2 ** (failures - 1)), LONGEST_PAUSE)
                print(f"{url}: {reason}; trying again in {pause:.0f} s ...")
                time.sleep(pause)
    kept = f"; the first {have:,} bytes are kept in {part}" if have else ""
    raise UserError(f"could not download {url} ({reason}){kept}; try again later")


def remote_size(url: str) -> int:
    """Return the length of the file at `url` in bytes, or 0 if the server does not tell."""
    with suppress(requests.RequestException, ValueError), open_session(url) as session:
        response = session.head(url, timeout=TIMEOUT, allow_redirects=True)
        return int(response.headers.get("Content-Length", 0)) if response.ok else 0
    return 0  # `download` will say what is wrong


def open_session(url: str) -> requests.Session:
    session, token = requests.Session(), os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub_url("")):  # nobody else may see the token
        session.headers["Authorization"] = f"Bearer {token}"
    session.headers["Accept-Encoding"] = "identity"  # lengths and ranges count uncompressed bytes
    return session


def fetch_rest(session: requests.Session, url: str, part: Path, sha256: str, size: int) -> None:
    """Complete and check `part`. Raises TryAgain or a network error if another attempt may help."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (ValueError, requests.TooManyRedirects) as error:
        reason = f"not a valid address, or redirected to one ({one_line(error)[:150]})"
        raise UserError(f"could not download {url}: {reason}; check the address") from error
    with response:
        check_status(response, url, have)
        start, total = content_range(response)
        # The hub announces the checksum before it redirects to the server that has the file.
        for answer in (response, *response.history):
            sha256 = sha256 or answer.headers.get("X-Linked-Etag", "").strip('"')
        if start <= have:
            most = min(total or size or MOST_BYTES, MOST_BYTES)
            have = write_body(response, part, start, most)
            if have > most:
                part.unlink()
                raise UserError(f"could not download {url}: it has more than {most:,} bytes")
        elif not have == total > 0:  # the answer is another range or, by status 416, no range
            part.unlink(missing_ok=True)
            raise TryAgain(f"the server does not send the bytes from {have:,} on")
    if total and have < total:
        raise TryAgain(f"the connection ended after {have:,} of {total:,} bytes")
    if len(sha256) == 64 and file_sha256(part) != sha256:
        part.unlink()
        raise TryAgain(f"the sha256 of the file is not {sha256}")


def check_status(response: requests.Response, url: str, have: int) -> None:
    """Raise TryAgain or UserError unless the response has bytes or says that there are no more."""
    status, answer = response.status_code, f"status {response.status_code} {response.reason}"
    if status in (408, 429, 500, 502, 503, 504):
        error, asked = TryAgain(answer), response.headers.get("Retry-After", "")
        error.seconds = float(asked) if asked.isdecimal() else 0.0
        raise error
    if status not in (200, 206, 416) or (status == 416 and not have):
        kind = NotFound if status == 404 else UserError
        hint = "set HF_TOKEN to your token, or " if status in (401, 403) else ""
        raise kind(f"could not download {url}: {answer}; {hint}check the name")


def content_range(response: requests.Response) -> tuple[int, int]:
    """Return where the body begins in the file, and the file's length (0: not known)."""
    text = response.headers.get("Content-Range", "")  # bytes 100-199/200, or bytes */200
    start, total = text.removeprefix("bytes ").split("-")[0], text.rpartition("/")[2]
    if response.status_code == 200:
        start, total = "0", response.headers.get("Content-Length", "")
    return int(start) if start.isdecimal() else 1 << 62, int(total) if total.isdecimal() else 0


def write_body(response: requests.Response, part: Path, start: int, most: int) -> int:
    """Write the body of the response to `part` from byte `start` on; return the new length."""
    bar = tqdm(total=most if most < MOST_BYTES else None, initial=start, desc=part.stem, **BAR)
    with open(part, "r+b" if part.exists() else "wb") as file, bar:
        file.truncate(start)
        file.seek(start)
        response.raw.enforce_content_length = False  # `fetch_rest` checks it and explains more
        # Raw bytes, because a server may compress them although it was asked not to.
        for chunk in response.raw.stream(1 << 14, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > most:
                break
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def short_reason(error: BaseException | None) -> str:
    """Return why a request failed, such as "Connection refused", without the objects around it."""
    while error:
        last, inner = error, (*error.args, getattr(error, "reason", None), error.__cause__)
        error = next((e for e in inner if isinstance(e, BaseException)), None)
    if isinstance(last, TimeoutError | urllib3.exceptions.TimeoutError):
        return f"no answer for {TIMEOUT} s"
    return one_line(getattr(last, "strerror", None) or last).split("): ")[-1][:150]
