"""A workflow behind a web handler of your own: one session for the whole application, an `async` handler, a stream.

    uvicorn --app-dir examples web_app:app
    curl localhost:8000/solve --json '{"text": "12 + 7"}'

`metier serve` needs none of this; write it where the workflow is a part of an application that you have.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from metier.agents import MetierError, Role, TaskGraph
from metier.runtime import Session, open_session
from metier.runtime.runs.session_opening import SessionOpening


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


graph = TaskGraph("solve", takes=Puzzle, gives=Answer)
graph.step(Role("solver", takes=Puzzle, gives=Answer, instructions="Solve: {{ puzzle.text }}"))
built = graph.build()


def make_app(opening: Callable[[], SessionOpening] = open_session) -> FastAPI:
    """The application; its session is opened when it starts and closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with opening() as session:
            await session.start_engines()  # or the first request waits for them
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    def session_of(request: Request) -> Session:
        session = request.app.state.session
        assert isinstance(session, Session)
        return session

    @app.post("/solve")
    async def solve(request: Request, puzzle: Puzzle) -> Answer:
        answer: Answer = await session_of(request).run(built, puzzle)
        return answer

    @app.post("/watch")
    async def watch(request: Request, puzzle: Puzzle) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async with session_of(request).stream(built, puzzle) as events:
                async for event in events:
                    yield event.model_dump_json(exclude_defaults=True) + "\n"

        return StreamingResponse(lines(), media_type="application/jsonl")

    @app.exception_handler(MetierError)
    async def failed(request: Request, error: MetierError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=502)

    return app


app = make_app()
