"""Writing to a gRPC stream whose client may not read.

Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
from typing import Any

from servd.api.grpc.status import Context
from servd.errors import DeadlineExceededError


async def write_in_time(context: Context, message: Any, seconds: float) -> None:
    """Write; waits while the client is behind, but not for ever.

    Raises DeadlineExceededError then, so that the request is aborted; the client learns of it when it reads on.
    """
    try:
        async with asyncio.timeout(seconds):
            await context.write(message)
    except TimeoutError:
        raise DeadlineExceededError(f"the client left its stream unread for {seconds:g} s") from None
