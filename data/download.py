"""One address -> one file: resumed, bounded, verified.

    download("https://...", "data/cache/aime24.jsonl", sha256, limit=2**24)

RESA_MIRROR=http://host:port in the environment: one server for all sites, at /SITE/PATH.
This file imports nothing of ours.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request

TIMEOUT = 30                # seconds without a byte after which a connection counts as dead
PAUSES = [1, 5, 20]         # seconds before each further attempt; a server may ask for others
LONGEST_PAUSE = 300

def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

def download(url, path, sha256=None, limit=2**30, token=None):
    """url -> path, through a partial file that a later run continues.

    sha256  what the bytes must be; None: whatever comes
    limit   the most bytes that are taken
    token   of the user, sent to this host and to no other it redirects to
    OSError: it could not be fetched.  ValueError: too long or other bytes, and nothing is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        persist(url, part, limit, token)
        found = sha256_of(part)
        if sha256 not in (None, found):
            raise ValueError(f"{url}: refused, its sha256 is {found} and not {sha256}")
    except ValueError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)

def persist(url, part, limit, token):
    """Pulls until all of it is there, repeating what may pass.  OSError names the address."""
    for pause in [*PAUSES, None]:
        again, asked = True, ""
        try:
            return pull(url, part, limit, token)
        except urllib.error.HTTPError as error:
            again = error.code >= 500 or error.code in (416, 429)
            asked, reason = error.headers.get("Retry-After", ""), str(error)
            if error.code == 416:                        # there is nothing after the partial file
                part.unlink(missing_ok=True)
        except urllib.error.URLError as error:           # no such host, or nobody listens
            again, reason = False, str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if pause is None or not again:
            raise OSError(f"{url}: {reason}")
        time.sleep(min(LONGEST_PAUSE, int(asked)) if asked.isdecimal() else pause)

def pull(url, part, limit, token):
    """Appends to the file `part` what it lacks.  OSError: cut short; ValueError: too long."""
    mirror = os.environ.get("RESA_MIRROR")
    address = url.replace("https:/", mirror.rstrip("/"), 1) if mirror else url
    request = urllib.request.Request(address, headers={"User-Agent": "resa"})
    start = part.stat().st_size if part.exists() else 0
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token:                                            # "unredirected" keeps it from other hosts
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        size = start if response.status == 206 else 0    # 200: this server sends all of it again
        whole = size + int(response.headers.get("Content-Length", 0))
        with open(part, "ab" if size else "wb") as file:
            while block := response.read1(2**16):        # read1: keep what came before a timeout
                size += file.write(block)
                if size > limit:
                    raise ValueError(f"{url}: refused, it is longer than {limit:,} bytes")
    if size < whole:
        raise OSError(f"it ended after {size:,} of {whole:,} bytes")
