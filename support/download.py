"""Fetch a file from the web so that it is whole and right, or not there at all.

What has arrived waits beside it as NAME.part, and the next attempt asks for the rest (HTTP Range).
"""

import os
import time
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from configurator import UserError, one_line
from support.files import file_sha256

TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt; it doubles with each further one


class NotFound(UserError):
    """The server is there, and has no such file."""


def hub_url(path: str) -> str:
    """A file on the Hugging Face hub or on the mirror of it that HF_ENDPOINT names."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def download(url: str, path: Path, sha256: str = "", tries: int = 5) -> None:
    """Bring `url` to `path`, which appears when it is whole.

    Its length and, if the hub gives one or `sha256` is set, its checksum are compared. A break is taken
    up where it happened; `tries` attempts in a row that bring nothing new raise UserError; a server that
    has no such file, NotFound.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, most, reason = 0, 0, ""
    with open_session(url, tries) as session:
        while failures < tries:
            if failures:
                time.sleep(PAUSE * 2 ** (failures - 1))
            try:
                reason = fetch_rest(session, url, part, sha256)
            except requests.RequestException as error:
                if isinstance(
                    error, requests.exceptions.InvalidSchema | requests.exceptions.InvalidURL
                ):
                    raise UserError(
                        f"{url}: no address to download from ({one_line(error)[:150]})"
                    ) from error
                reason = one_line(error)[:200]
                if error.args and isinstance(error.args[0], MaxRetryError):
                    reason = one_line(error.args[0].reason)[:200]
                    break  # the session has tried often enough
            if not reason:
                os.replace(part, path)
                return
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
    kept = f"; the first {most:,} bytes are kept in {part}" if part.exists() else ""
    raise UserError(
        f"{url}: can not be downloaded ({reason}){kept}; try again later, or set HF_ENDPOINT to a mirror"
    )


def remote_size(url: str) -> int:
    """Bytes of the file at `url`, or 0 if the server does not say."""
    try:
        with open_session(url, tries=2) as session:
            answer = session.head(url, timeout=TIMEOUT, allow_redirects=True)
        return int(answer.headers.get("Content-Length", 0)) if answer.ok else 0
    except (requests.RequestException, ValueError):
        return 0  # whether it can be had at all, `download` finds out


def open_session(url: str, tries: int) -> requests.Session:
    """A session for `url` that asks again, ever more slowly, while a server is not there or not well."""
    session, token = requests.Session(), os.environ.get("HF_TOKEN")
    if token and url.startswith(hub_url("")):  # it is for the hub alone
        session.headers["Authorization"] = f"Bearer {token}"
    session.headers["Accept-Encoding"] = (
        "identity"  # lengths and ranges are those of the file itself
    )
    retry = Retry(
        total=tries - 1, backoff_factor=PAUSE, status_forcelist=(408, 429, 500, 502, 503, 504)
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def fetch_rest(session: requests.Session, url: str, part: Path, sha256: str) -> str:
    """Add to `part` what it lacks, and check it. Returns why it is not whole, or ""."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status in (401, 403):
            raise UserError(
                f"{url}: the server wants to know who asks (status {status}; so the hub answers to a name that does "
                "not exist, too); check the name, or set HF_TOKEN to your token"
            )
        if status not in (200, 206, 416):
            raise (NotFound if status == 404 else UserError)(
                f"{url}: the server answers {status} {response.reason}; is there such a file?"
            )
        start, total = content_range(response)
        # The hub says what the file is before it sends us on to where it lies.
        tags = [
            answer.headers.get("X-Linked-Etag", "").strip('"')
            for answer in (response, *response.history)
        ]
        sha256 = sha256 or next((tag for tag in tags if len(tag) == 64), "")
        if status == 416 or start > have:  # more than there is, or not what was asked for
            if status == 416 and have == total:
                return check(part, total, sha256)
            part.unlink(missing_ok=True)
            return f"the server answers {status} to bytes {have:,} and on"
        with (
            open(part, "r+b" if part.exists() else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                leave=False,
                disable=None,
            ) as bar,
        ):
            file.seek(start)
            file.truncate()
            for chunk in response.iter_content(
                1 << 14
            ):  # a break loses the chunk that was under way
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    return check(part, total, sha256)


def content_range(response: requests.Response) -> tuple[int, int | None]:
    """Where the body of an answer begins in the file, and how long the whole file is, if it is said."""
    said = response.headers.get("Content-Range", "")  # bytes 100-199/200, or bytes */200
    if response.status_code == 200:
        start, total = "0", response.headers.get("Content-Length", "")
    else:
        start, total = said.removeprefix("bytes ").split("-")[0], said.rpartition("/")[2]
    return int(start) if start.isdecimal() else 1 << 62, int(total) if total.isdecimal() else None


def check(part: Path, total: int | None, sha256: str) -> str:
    """Why the file is not what the server promised, or ""; one that is wrong is removed."""
    size = part.stat().st_size
    if total is not None and size < total:
        return f"the connection ended after {size:,} of {total:,} bytes"
    reason = ""
    if total is not None and size > total:
        reason = f"{size:,} bytes came, {total:,} were promised"
    elif sha256 and file_sha256(part) != sha256:
        reason = f"its sha256 is not {sha256}"
    if reason:
        part.unlink()
    return reason
