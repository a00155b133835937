"""schemathesis reads /openapi.json and calls what it lists: every reply must be one that the document names."""

import asyncio
import sys
from pathlib import Path

from tests.api.http.serving import serve

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "unsupported_method", "negative_data_rejection",
)  # fmt: skip
SECONDS = 240  # a bound on the whole run
ENDLESS = "/v1/engine/events"  # a stream that ends with the server


def test_replies_are_those_that_the_document_names(tmp_path: Path) -> None:
    async def main() -> tuple[int, str]:
        async with serve(tmp_path, max_position_embeddings=256) as served:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
                f"{served.url}/openapi.json", "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing",
                "--max-examples", "60", "--seed", "1", "--exclude-path", ENDLESS, "--request-timeout", "20",
                "--generation-database", "none", "--no-color",
                cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                async with asyncio.timeout(SECONDS):
                    output, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                raise
            assert process.returncode is not None
            return process.returncode, output.decode(errors="replace")

    code, output = asyncio.run(main())
    assert code == 0, output[-8000:]
