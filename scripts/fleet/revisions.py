"""The object's revisions, and the judgement on what a client downloaded.

Every 4 KiB page of revision N begins with N and with the page's own offset, so a file that is not one revision can say
what it is made of. The judge is stricter than that: S3's ETag of a single PUT is the MD5 of its bytes, so a file is a
revision exactly if its MD5 is that revision's ETag.
"""

import hashlib
import random
import struct

PAGE = 4096
HEADER = struct.Struct("<QQ")


class Revisions:
    """The revisions that there are. Once all were uploaded, any number of threads may judge."""

    def __init__(self, size):
        if size % PAGE:
            raise ValueError(f"the size must be a multiple of {PAGE}")
        self.size = size
        self._buffer = bytearray(random.Random(size).randbytes(PAGE) * (size // PAGE))
        for offset in range(0, size, PAGE):
            HEADER.pack_into(self._buffer, offset, 0, offset)
        self._numbers = {}

    def bytes_of(self, number):
        """The bytes of a revision, valid until the next call."""
        for index, byte in enumerate(number.to_bytes(8, "little")):
            self._buffer[index::PAGE] = bytes([byte]) * (self.size // PAGE)
        return memoryview(self._buffer)

    def stretch_of(self, number, start, end):
        """A stretch of a revision's bytes. Any number of threads may ask, once all were uploaded."""
        first = start - start % PAGE
        stretch = bytearray(self._buffer[first : -(-end // PAGE) * PAGE])
        for offset in range(0, len(stretch), PAGE):
            HEADER.pack_into(stretch, offset, number, first + offset)
        return bytes(stretch[start - first : end - first])

    def number_of(self, etag):
        """None: nobody uploaded that."""
        return self._numbers.get(etag)

    def uploaded(self, number, etag):
        self._numbers[etag] = number

    def judge(self, path, pin):
        """None if the file is the pinned revision, or without a pin any one revision; else what is wrong with it."""
        digest = hashlib.md5()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        etag = f'"{digest.hexdigest()}"'
        if etag == pin or (pin is None and etag in self._numbers):
            return None
        pinned = f"pinned {self._numbers.get(pin, pin)}, but " if pin else ""
        return f"{pinned}the file {self._describe(path, etag)}"

    def _describe(self, path, etag):
        """What the file is made of, for the report."""
        if etag in self._numbers:
            return f"is revision {self._numbers[etag]}, whole"
        stretches = []
        with open(path, "rb") as file:
            data = file.read()
        for offset in range(0, len(data) - HEADER.size + 1, PAGE):
            number, at = HEADER.unpack_from(data, offset)
            what = number if at == offset else "not ours"
            if not stretches or stretches[-1][1] != what:
                stretches.append((offset, what))
        if len(stretches) == 1 and len(data) == self.size and stretches[0][1] != "not ours":
            return f"is revision {stretches[0][1]} but for {self._differences(data, stretches[0][1])}"
        made_of = ", ".join(f"{what} from {offset}" for offset, what in stretches[:8])
        more = f" and {len(stretches) - 8} stretches more" if len(stretches) > 8 else ""
        return f"has {len(data)} bytes of {self.size}, revision {made_of}{more}"

    def _differences(self, data, number):
        """Where the bytes differ from the revision whose pages they seem to be: a flipped bit, a hole."""
        expected = self.stretch_of(number, 0, self.size)
        places = [
            offset
            for page in range(0, self.size, PAGE)
            if data[page : page + PAGE] != expected[page : page + PAGE]
            for offset in range(page, page + PAGE)
            if data[offset] != expected[offset]
        ]
        shown = ", ".join(f"{offset}: {data[offset]:#04x} for {expected[offset]:#04x}" for offset in places[:8])
        return f"{len(places)} bytes from {places[0]} to {places[-1]} ({shown})"
