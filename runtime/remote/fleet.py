"""Several vLLM servers as one backend: adapters loaded where asks need them, servers chosen by predicted finish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import anyio

from ...agents.backend import OnText, ResumedText
from ...agents.errors import (
    AskRejectedError,
    EngineDeadError,
    EngineError,
    MetierError,
    NotServedError,
    SettingsError,
    UnknownVariantError,
)
from ...agents.messages import Ask, Reply
from ...router.placement.placement import PlacedAsk, Placement, PlacementCosts, ReplicaState, place
from ...router.placement.token_estimates import TokenEstimates
from ..closing import AsyncClosing, BackgroundTasks
from ..events import OnEvent
from ..settings.fleet import FleetSettings, RemoteSettings
from .fleet_member import FleetMember
from .remote_backend import RemoteBackend, Resolve
from .server_calls import GarbledAnswerError, ServerBusyError

if TYPE_CHECKING:
    from pathlib import Path

    from ...specializers.shelf.variant import Variant

__all__ = ["Fleet"]

Place = Callable[[PlacedAsk, Sequence[ReplicaState], PlacementCosts], Placement]


class Fleet(AsyncClosing):
    """A backend over the servers of the settings. Start it with `async with`.

    Every ask goes to one healthy server that may hold its adapter, chosen by `place` from this driver's own account
    of what is where. On vLLM's servers the adapters are loaded and unloaded within each one's slots; `metier serve`
    moves them by itself. An ask that failed because its server failed is asked again on another; an ask that was
    rejected is not. The reply says where it was placed and why. `resolve` finds variants as for `RemoteBackend`.
    """

    def __init__(
        self,
        settings: FleetSettings,
        resolve: Resolve | None = None,
        remote: RemoteSettings | None = None,
        *,
        api_key: str | None = None,
        on_event: OnEvent | None = None,
        place: Place = place,
    ) -> None:
        if not settings.servers:
            raise SettingsError(
                "a fleet without servers", expected="fleet.servers in the settings, or --engine URL,URL"
            )
        self._settings = settings
        self._known: dict[str, tuple[Variant, Path]] = {}
        self._resolve = resolve
        self._remote = remote or RemoteSettings()
        self._place = place
        self._estimates = TokenEstimates()
        self._bases: dict[bool, tuple[str, str]] = {}
        self._tasks = BackgroundTasks()
        self._looking, self._looked = anyio.Lock(), False
        find = None if resolve is None else self._find
        # A call that fails is tried elsewhere at once, not here again.
        once = self._remote.model_copy(update={"retries": 0})
        self._members = {
            member.url: member
            for member in (
                FleetMember(
                    server,
                    RemoteBackend(server.url, find, once, api_key=api_key),
                    settings,
                    self._check_base,
                    find,
                    on_event or (lambda event: None),
                )
                for server in settings.servers
            )
        }

    async def __aenter__(self) -> Self:
        await self._tasks.open()
        for member in self._members.values():
            self._tasks.start(member.watch)
        return self

    async def close(self) -> None:
        """Stop watching and close the connections; the servers go on. Closing twice is harmless."""
        try:
            await self._tasks.close()
        finally:
            for member in self._members.values():
                await member.remote.close()

    async def warm(self, variants: Iterable[str | None] = (None,)) -> None:
        """Look at every server, and check that each of these variants has one that can serve it; loads nothing.

        A server that does not answer is left out until it does.
        Raises: EngineDeadError when none answers; EngineError when one serves another model, or when no server can
        serve a variant (UnknownVariantError where none knows it).
        """
        self._looked = True
        wrong: dict[str, EngineError] = {}

        async def look(member: FleetMember) -> None:
            try:
                await member.look()
            except EngineError as error:
                wrong[member.url] = error

        async with anyio.create_task_group() as looks:
            for member in self._members.values():
                looks.start_soon(look, member)
        for url, member in self._members.items():
            error = wrong.get(url)
            if error is None:
                member.join()
            elif isinstance(error, EngineDeadError):
                member.lose(error)
            else:
                raise error
        if len(wrong) == len(self._members):
            raise self._nobody_answers({})
        for variant in dict.fromkeys(variants):
            await self._check(variant)

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`.

        Raises: AskRejectedError (refused as wrong), EngineError (no server can serve the variant), EngineDeadError
        (no server answers, or `tries` of them have failed).
        """
        if not self._looked:
            async with self._looking:
                if not self._looked:
                    await self.warm(())
        placed = self._estimates.placed(ask, self._adapter(ask.variant))
        streamed = None if on_text is None else ResumedText(on_text)
        refused: dict[str, Exception] = {}
        failed: dict[str, Exception] = {}
        waits, wait_s, before = self._remote.retries, self._remote.retry_wait_s, ""
        tries = self._settings.tries
        while tries:
            while (placement := self._choose(ask, placed, failed.keys() | refused.keys())) is None:
                self._check_left(ask.variant, placed, refused)
                if not waits:
                    raise self._nobody_answers(refused | failed)
                await anyio.sleep(min(wait_s, self._remote.retry_wait_max_s))
                waits, wait_s = waits - 1, 2 * wait_s
                failed.clear()
            member = self._members[placement.replica]
            try:
                reply = await member.ask(ask, placed, streamed)
            except ServerBusyError as error:
                failed[member.url] = error
                continue  # it is healthy: waiting for room has bounds of its own
            except (EngineDeadError, GarbledAnswerError) as error:
                member.failed(error)
                failed[member.url] = error
            except AskRejectedError as error:
                if not isinstance(error, NotServedError):
                    raise
                refused[member.url] = error
            except EngineError as error:
                refused[member.url] = error
            else:
                self._estimates.note(ask, reply.usage)
                return reply.model_copy(update={"placement": before + placement.reason})
            tries -= 1
            before = f"{member.url} failed; "
            if streamed is not None:
                streamed.restart()
        raise EngineDeadError(
            f"ask {ask.id!r} failed {self._settings.tries} times, the last time at {member.url}: {member.trouble}",
            expected=f"an answer within fleet.tries={self._settings.tries}",
            remedy="Look at the servers' own logs.",
        )

    async def drain(self, url: str) -> None:
        """Send no more asks to a server until `admit`, and wait for those under way.

        Raises: SettingsError for a server that is not in the fleet.
        """
        await self._member(url).drain()

    def admit(self, url: str) -> None:
        """Let a drained server have asks again."""
        self._member(url).admit()

    @property
    def model(self) -> str:
        """Which base answers (see `RemoteBackend.model`), from the servers that have been reached."""
        ours, others = self._bases.get(True), self._bases.get(False)
        named = [ours[0]] if ours else []
        return " and ".join([*named, f"{others[0]} at {', '.join(sorted(self._members))}"] if others else named)

    def totals(self) -> dict[str, dict[str, Any]]:
        """Server → what it has done for this driver (see `EnginePool.totals`)."""
        return {url: asdict(member.counters) for url, member in self._members.items()}

    # --- choosing -----------------------------------------------------------------------------------------

    def _choose(self, ask: Ask, placed: PlacedAsk, without: Collection[str]) -> Placement | None:
        states = [
            member.account.state
            for url, member in self._members.items()
            if url not in without and member.account.state.healthy and member.may_hold(ask.variant, placed.adapter)
        ]
        return self._place(placed, states, self._settings.costs) if states else None

    def _check_left(self, variant: str | None, placed: PlacedAsk, refused: Mapping[str, Exception]) -> None:
        """Raise when every server that may hold the adapter has refused it: waiting would change nothing."""
        allowed = [url for url, member in self._members.items() if member.may_hold(variant, placed.adapter)]
        if refused.keys() >= set(allowed):
            raise self._nobody_serves(variant, refused)

    async def _check(self, variant: str | None) -> None:
        reasons: dict[str, Exception] = {}
        adapter = self._adapter(variant)
        for url, member in self._members.items():
            if not member.may_hold(variant, adapter):
                continue
            try:
                if not member.account.state.healthy:
                    raise EngineDeadError(member.trouble)
                await member.remote.check(variant)
                return
            except (EngineError, UnknownVariantError) as error:
                reasons[url] = error
        raise self._nobody_serves(variant, reasons)

    def _find(self, name: str) -> tuple[Variant, Path]:
        found = self._known.get(name)
        if found is None:
            assert self._resolve is not None
            found = self._known[name] = self._resolve(name)
        return found

    def _adapter(self, name: str | None) -> str | None:
        """The content id of a variant's adapter; its name where only the servers know it."""
        if name is None or self._resolve is None:
            return name
        try:
            variant, _ = self._find(name)
        except UnknownVariantError:
            return name
        return None if variant.ask.adapter is None else variant.id

    def _check_base(self, remote: RemoteBackend) -> None:
        if not remote.base:
            return
        said = f"fleet.model={self._settings.model!r}" if self._settings.model else ""
        expected, by = self._bases.setdefault(remote.ours, (self._settings.model or remote.base, said or remote.url))
        if remote.base != expected:
            raise EngineError(
                f"{remote.url} serves {remote.base!r}, and {by} {'is set' if said else f'serves {expected!r}'}",
                expected="the same base at every server",
                remedy="Take it out of fleet.servers, or start vLLM with --served-model-name if it is the same model.",
            )

    def _member(self, url: str) -> FleetMember:
        member = self._members.get(url.rstrip("/").removesuffix("/v1").lower())
        if member is None:
            raise SettingsError(f"no server {url!r} in the fleet", expected=f"one of {', '.join(self._members)}")
        return member

    # --- errors -------------------------------------------------------------------------------------------

    def _nobody_answers(self, refused: Mapping[str, Exception]) -> EngineDeadError:
        troubles = {url: member.trouble for url, member in self._members.items() if member.trouble}
        reasons = "; ".join(f"{url}: {why}" for url, why in ({**troubles, **_problems(refused)}).items())
        return EngineDeadError(
            f"no server takes asks: {reasons}",
            expected="one that answers",
            remedy="Start one, then resume the batch: what was recorded is kept.",
        )

    def _nobody_serves(
        self, variant: str | None, reasons: Mapping[str, Exception]
    ) -> EngineError | UnknownVariantError:
        said = "; ".join(f"{url}: {why}" for url, why in _problems(reasons).items())
        unknown = all(isinstance(error, UnknownVariantError | NotServedError) for error in reasons.values())
        kind: type[EngineError | UnknownVariantError] = UnknownVariantError if unknown else EngineError
        return kind(
            f"no server can serve variant {variant or 'base'!r}: {said or 'fleet.servers lets none hold it'}",
            expected="at least one server that may hold it and can",
            remedy="Name it in the `adapters` of a server in fleet.servers, on a disk that the server sees.",
        )


def _problems(errors: Mapping[str, Exception]) -> dict[str, str]:
    return {url: error.problem if isinstance(error, MetierError) else str(error) for url, error in errors.items()}
