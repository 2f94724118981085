"""`Persistence`: which store keeps which contract in which mode, for one program."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from backtest_kit.errors import UserError
from backtest_kit.model.identity import Mode
from backtest_kit.persist import diagnosis
from backtest_kit.persist.adapters import CandleAdapter, ContractAdapter, adapter_name
from backtest_kit.persist.contracts import CONTRACTS, Contract, Durability, Home, contract
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.history import RevisionStore, check_history
from backtest_kit.persist.operations import RUN_PREFIX
from backtest_kit.persist.store import Capability, Store, Write
from backtest_kit.persist.upkeep import Reading
from backtest_kit.persist.urls import store_at
from backtest_kit.seams import SYSTEM, Seams

MODES: Final[tuple[Mode, ...]] = ("live", "paper", "backtest")
EVERY: Final = "*"
"""Stands for all contracts in `bind`."""


def home_of(row: Contract, mode: Mode) -> Home:
    """The default profile."""
    return row.backtest if mode == "backtest" else row.live


async def runs_in(store: Store) -> set[str]:
    """The ids of the backtests that have kept something in a store. Raises `RetryLater` if it cannot be asked."""
    if Capability.LISTING not in store.capabilities:
        return set()
    return {path[0].removeprefix(RUN_PREFIX) for path in await store.namespaces() if path[0].startswith(RUN_PREFIX)}


class Persistence:
    """The bindings of one program, the stores behind them, and the front door of each contract.

    A binding of a contract by name comes first, one for its mode before one for all modes; then
    `bind("*", store, mode=...)`, which takes every contract of that mode; then the default profile, in
    which `bind("*", store)` says what the bound store is. Without any binding that is the store at the
    address in `CC_STORE`, or else the files of `./dump`. An address of files stands for both: what is kept
    in files whatever is bound is there as well.

    Modes never see each other's records: paper has the namespace `paper`, and backtests have `backtest`
    or, with a run id, `backtest-<run>`. Caches (candle, measure) are the same for all of them.
    """

    candle: CandleAdapter

    def __init__(
        self,
        *,
        files: Callable[[], Store] | None = None,
        environ: Mapping[str, str] | None = None,
        seams: Seams = SYSTEM,
    ) -> None:
        """`files` makes the file store, when it is first needed; by default the one at `./dump`. `seams` are those of
        the leases that are taken in the stores.

        Raises:
            UserError: `CC_STORE` in `environ` is not the address of a store.
        """
        self._makers: dict[Home, Callable[[], Store]] = {
            Home.FILE: files or (lambda: store_at("file:./dump")),
            Home.MEMORY: lambda: store_at("memory:"),
        }
        self.seams: Final = seams
        self._homes: dict[Home, Store] = {}
        self._bindings: dict[tuple[str, Mode | None], Store] = {}
        self._namespaces: dict[tuple[int, str], Store] = {}
        self._with_history: set[str] = set()
        self._histories: dict[tuple[int, str, str], RevisionStore] = {}
        self._used: dict[int, Store] = {}
        self._deferred: dict[str, list[Callable[[], Iterable[Write]]]] = {}
        address = (environ or {}).get("CC_STORE")
        if address:
            # The state of a program lies in one root: files are kept in the one that was named, not in ./dump.
            self._homes[Home.FILE if address.startswith("file:") else Home.BOUND] = store_at(address)
        self.candle = CandleAdapter(self, CONTRACTS["candle"])
        self.adapters: dict[str, ContractAdapter] = {
            name: ContractAdapter(self, row) for name, row in CONTRACTS.items() if name != "candle"
        }

    def __getattr__(self, name: str) -> ContractAdapter:
        """`persistence.signal` and so on: the front door of the contract called `name`."""
        adapters: dict[str, ContractAdapter] = self.__dict__.get("adapters", {})
        if name not in adapters:
            raise AttributeError(f"Persistence has no {name!r}; the contracts are {', '.join(CONTRACTS)}")
        return adapters[name]

    def front_doors(self) -> dict[str, ContractAdapter | CandleAdapter]:
        """The front door of every contract under its public name: `PersistSignalAdapter` and so on."""
        doors: dict[str, ContractAdapter | CandleAdapter] = {"candle": self.candle, **self.adapters}
        return {adapter_name(row): doors[name] for name, row in CONTRACTS.items()}

    def bind(self, contract_name: str, store: Store, *, mode: Mode | None = None) -> None:
        """Keep a contract, or all of them (`"*"`), in `store`; in one mode, or in all.

        It takes effect at the next read or write. The store is closed with this object.

        Raises:
            UserError: unknown contract or mode.
        """
        if contract_name != EVERY:
            contract(contract_name)
        if mode is not None:
            check_mode(mode)
        if contract_name == EVERY and mode is None:
            self._homes[Home.BOUND] = store
        else:
            self._bindings[contract_name, mode] = store

    def unbind(self, mode: Mode) -> None:
        """Undo `bind("*", store, mode=mode)`, if it was called: the default profile holds in that mode again."""
        store = self._bindings.pop((EVERY, mode), None)
        if store is not None:
            self._used[id(store)] = store  # it is closed with this object all the same

    def adopt(self, store: Store) -> None:
        """Close `store` with the others, though nothing may be bound to it."""
        self._used[id(store)] = store

    def keep_history(self, *contract_names: str) -> None:
        """Keep what the records of these contracts were before, for reads `as_of` a moment, from now on.

        Each write that replaces something then costs a read and a second write. What was replaced is kept for
        CC_RETENTION_HISTORY_DAYS.

        Raises:
            UserError: unknown contract, or its records have no history.
        """
        for name in contract_names:
            check_history(contract(name))
        self._with_history |= set(contract_names)

    def store_for(self, row: Contract, mode: Mode, run: str | None = None, *, history: bool = True) -> Store:
        """The store that keeps `row` in `mode`, in the namespace of that mode and run; without `history` the one for
        what the program writes there for itself, of which no history is kept."""
        check_mode(mode)
        store = self._bound(row, mode)
        self._used[id(store)] = store
        namespace = _namespace(row, mode, run)
        space = self._within(store, namespace, run) if namespace else store
        if not history or row.name not in self._with_history:
            return space
        return self._histories.setdefault((id(store), namespace, row.name), RevisionStore(space, row))

    def _within(self, store: Store, namespace: str, run: str | None) -> Store:
        # One object per namespace, because a store may keep the order of writes in it.
        key = (id(store), namespace)
        if key not in self._namespaces:
            self._namespaces[key] = store.namespace(namespace)
        space = self._namespaces[key]
        if run in self._deferred and store is self._homes.get(Home.MEMORY):
            self._make_deferred(run, space)
        return space

    def in_memory(self, row: Contract, mode: Mode) -> bool:
        """Whether `row` lies in the memory of this process, because it is not bound elsewhere, and has no history."""
        return row.name not in self._with_history and self._bound(row, mode) is self._homes.get(Home.MEMORY)

    def defer(self, run: str, writes: Callable[[], Iterable[Write]]) -> None:
        """Ask for writes of a backtest, all to contracts that are `in_memory`, at the first read there.

        Most callers of a backtest only want its result, and so it need not write down what is never read.
        """
        self._deferred.setdefault(run, []).append(writes)

    def _make_deferred(self, run: str, memory: Store) -> None:
        for writes in self._deferred.pop(run, ()):
            for write in writes():
                memory.put_now(write)

    async def runs(self) -> list[str]:
        """The ids of the backtests whose records are kept, sorted: by their start, unless they were named.

        Raises:
            RetryLater: a store cannot be asked.
        """
        stores = self._stores_of("backtest")
        return sorted(set().union(*[await runs_in(store) for store in stores]))

    def file_store(self) -> Store:
        """The file store of this program, whatever is bound."""
        return self._home(Home.FILE)

    def stores(self) -> list[Store]:
        """Every store that was used or bound so far, each once, without a namespace."""
        bound = {id(store): store for store in (*self._homes.values(), *self._bindings.values())}
        return list((bound | self._used).values())

    def _stores_of(self, mode: Mode, *rows: Contract) -> list[Store]:
        """The stores that keep `rows` in a mode, or every contract if none are named, each once."""
        stores = {id(store): store for store in (self._bound(row, mode) for row in rows or CONTRACTS.values())}
        self._used |= stores
        return list(stores.values())

    async def open(self, mode: Mode = "live") -> None:
        """Open every store that `mode` uses, so that what is wrong with one shows before the first trade.

        Raises:
            What `Store.open` of any of them raises.
        """
        await asyncio.gather(*(store.open() for store in self._stores_of(mode)))

    async def require_live_grade(self, *, allow_weak: bool = False) -> list[Reading]:
        """Open the stores that keep money in live trading, and return what there is to say of them if it can be
        trusted to them. To be called before the first live run; the command `backtest-kit live` does.

        Raises:
            UserError: one is weak, which `allow_weak` lets pass, or at fault; see `diagnosis.require_live_grade`.
            What `Store.open` of any of them raises.
        """
        readings = []
        money = [row for row in CONTRACTS.values() if row.durability is Durability.MONEY]
        for store in self._stores_of("live", *money):
            await store.open()
            readings += await diagnosis.require_live_grade(store, allow_weak=allow_weak)
        return readings

    async def leave_loop(self) -> None:
        """Close the connections that stores have made for the running event loop, which is about to end."""
        for store in self.stores():
            await store.leave_loop()

    async def close(self) -> None:
        """Flush and close every store that was used or bound, each once, also if one of them fails."""
        stores = self.stores()
        self._used.clear()
        self._namespaces.clear()
        self._histories.clear()
        results = await asyncio.gather(*(store.close() for store in stores), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def batch(self, writes: Sequence[Write], *, mode: Mode, run: str | None = None) -> None:
        """Do `writes`, which are in an order in which a crash between any two of them can be recovered from.

        All or nothing where one store keeps them all and has atomic batches. Otherwise one after the other, and the
        first that fails ends it.

        Raises:
            As `Store.batch`; without an atomic batch, the writes before the failed one have been done.
        """
        stores = [self.store_for(write.contract, mode, run) for write in writes]
        if len({id(store) for store in stores}) == 1:
            await stores[0].open()  # whether a server has transactions is known once it has answered
            if Capability.ATOMIC_BATCH in stores[0].capabilities:
                await stores[0].batch(writes)
                return
        for number, (store, write) in enumerate(zip(stores, writes, strict=True)):
            if number:
                crashpoint("batch.between_writes")
            await store.put(write)

    def _bound(self, row: Contract, mode: Mode) -> Store:
        for key in ((row.name, mode), (row.name, None), (EVERY, mode)):
            if key in self._bindings:
                return self._bindings[key]
        return self._home(home_of(row, mode))

    def _home(self, home: Home) -> Store:
        if home is Home.BOUND and home not in self._homes:
            home = Home.FILE
        if home not in self._homes:
            self._homes[home] = self._makers[home]()
        return self._homes[home]


def check_mode(mode: str) -> None:
    """Raise `UserError` if the mode is unknown."""
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}: use one of {', '.join(MODES)}")


def _namespace(row: Contract, mode: Mode, run: str | None) -> str:
    if mode == "live" or row.durability is Durability.CACHE:
        return ""
    if mode == "paper":
        return "paper"
    return f"{RUN_PREFIX}{run}" if run else "backtest"
