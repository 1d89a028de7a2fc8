"""$name as a Ray Serve application: replicas of one model, more of them as more is asked. Made by lmworks $version."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from lmworks.deploy.function import make_handler


class Model:
    """A replica: it opens the model once, and answers one question at a time; serve.yaml says how many there are."""

    def __init__(self) -> None:
        self.handler = make_handler(Path(__file__).parent / "model", dtype="$dtype", name="$name")
        self.worker = ThreadPoolExecutor(1)

    async def __call__(self, request: Request) -> Response:
        event = {"httpMethod": request.method, "body": (await request.body()).decode("utf-8", "replace")}
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self.worker, self.handler, event, None)
        return Response(answer["body"], answer["statusCode"], answer["headers"])


app = serve.deployment(Model).bind()
