"""Download a file so that it is complete and correct, or not there at all.

The bytes that have arrived wait in NAME.part, and the next attempt asks for the rest (HTTP Range).
"""

import os
import re
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import HTTPError, IncompleteRead

from configurator import UserError, one_line
from support.files import file_sha256, lock_path, progress_bar, replace

PAUSE = 0.5  # seconds; with 4 retries, urllib3 waits 0, 1, 2 and 4 s for a server that is not there
BUSY = (408, 429, 500, 502, 503, 504)  # statuses of a server that may have the file later
MOST_BREAKS = 8  # times that the connection may be lost in the middle of a file


def hub_url(path: str) -> str:
    """Return the address of a file on the Hugging Face hub, or on the mirror HF_ENDPOINT."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def download(url: str, path: Path, sha256: str = "") -> None:
    """Download `url` to `path`, if it is not there, so that it is complete. Raises UserError.

    Verifies the length, and the sha256 if it is given here or by the hub. An interrupted download
    resumes. While another process downloads the same file, waits for it.
    """
    part = path.with_name(path.name + ".part")
    with lock_path(path, seconds=600), open_session(url) as session:
        if path.exists() and (not sha256 or file_sha256(path) == sha256):
            return
        for breaks in range(MOST_BREAKS + 1):
            try:
                announced = fetch_rest(session, url, part)
                break
            except (requests.RequestException, HTTPError, ValueError) as error:
                if isinstance(error, HTTPError) and breaks < MOST_BREAKS:
                    continue  # where the connection was lost
                # Leave out the objects that urllib3 names before the reason of the system.
                noise = r'.*(\): |\[Errno .+?\] )|\)?"\)\)$| for url: http.*'
                reason = re.sub(noise, "", one_line(error))[:150]
                hint = "check the address, or try again later"
                raise UserError(f"could not download {url} ({reason}); {hint}") from error
        sha256 = sha256 or announced
        if len(sha256) == 64 and file_sha256(part) != sha256:
            part.unlink()
            raise UserError(f"could not download {url}: the sha256 of the file is not {sha256}")
        replace(part, path)


def open_session(url: str) -> requests.Session:
    """Return a session that tries to connect five times. Only the hub gets HF_TOKEN."""
    session, token = requests.Session(), os.environ.get("HF_TOKEN", "").strip()
    retry = Retry(4, backoff_factor=PAUSE, status_forcelist=BUSY, raise_on_status=False)
    retry.respect_retry_after_header = False  # a server may ask for hours
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # lengths and ranges count uncompressed bytes
    if token and url.startswith(hub_url("")):
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def fetch_rest(session: requests.Session, url: str, part: Path) -> str:
    """Append the missing bytes to `part`, and return the sha256 that the hub announces, or "".

    Raises urllib3's HTTPError if the connection is lost in the middle: the next call goes on there.
    """
    have = max(0, part.stat().st_size - 1) if part.exists() else 0
    if have:
        os.truncate(part, have)  # nothing can be asked for behind the last byte of a whole file
    ranges = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=ranges, stream=True, timeout=30) as response:
        span = response.headers.get("Content-Range", "")  # bytes 100-199/200
        if have and response.status_code in (206, 416) and not span.startswith(f"bytes {have}-"):
            part.unlink()  # not the bytes that are missing: start from the beginning
            return fetch_rest(session, url, part)
        response.raise_for_status()
        have *= response.status_code == 206  # a server that knows no ranges sends the whole file
        total = int(span.rpartition("/")[2] or response.headers.get("Content-Length", 0))
        bar = progress_bar(total or None, have, desc=part.stem)
        with bar, open(part, "ab" if have else "wb") as file:
            for chunk in response.raw.stream(1 << 16, decode_content=False):
                bar.update(len(chunk))
                have += file.write(chunk)
            os.fsync(file.fileno())
        if have < total:
            raise IncompleteRead(have, total - have)
        # The hub announces the checksum before it redirects to the server that has the file.
        sums = (answer.headers.get("X-Linked-Etag", "") for answer in (*response.history, response))
        return next(filter(None, sums), "").strip('"')
