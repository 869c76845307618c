"""The message handlers of security."""

from __future__ import annotations

import logging
from typing import ClassVar

import msgspec

from llmos.ipc import codec, paths
from llmos.ipc.calls import Answer
from llmos.ipc.errors import AccessDenied, HostDown, InvalidArgument, LLMOSError, NotFound
from llmos.ipc.grant import Grant
from llmos.ipc.link import now
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Revoke
from llmos.services.security import audit, keys, rights, rootkey, tokens
from llmos.services.security.audit import AuditLog, Event
from llmos.services.security.messages import (
    Mint,
    Minted,
    Revoked,
    RevokeToken,
    StorageKey,
    StorageKeyQuery,
    Verified,
    Verify,
)
from llmos.services.security.revocations import Revocations, check_id

KERNEL_CONNECTION = 0
KERNEL_SECONDS = 10.0
REFUSALS_PER_SECOND = 5
SEEN = 65536
DRIVER = "driver."
NOBODY = Grant(principal="", tenant="")
log = logging.getLogger("llmos.security")


class SecurityServer(Server):
    """Holds the root key; ``_tenants`` remembers whose the revocation ids are that passed here."""

    name: ClassVar[str] = "security"

    def start(self) -> None:
        state = paths.private_dir(paths.state_dir())
        self._root = rootkey.load(state)
        self._master = rootkey.secret(state, "storage.key")
        self._revoked = Revocations(state / "revoked")
        self._audit = AuditLog(state / "audit.log")
        self._tenants: dict[str, str] = {}
        for event in audit.read(state / "audit.log"):
            if event.kind == "mint":
                self._remember(event.ids, event.tenant)
        self._refusals = 0
        self.every(1.0, self._allow_refusals)

    def stop(self) -> None:
        self._audit.close()

    @method
    def verify(self, request: Verify, call: Incoming) -> Verified:
        if call.origin.connection != KERNEL_CONNECTION:
            raise AccessDenied("only the kernel may ask for this: present the token to it")
        try:
            parsed = tokens.parse(request.token, self._root.public_key)
            grant = tokens.verify(parsed, now(), self._revoked)
        except AccessDenied as error:
            self._note_refusal(error)
            raise
        self._remember(parsed.ids, grant.tenant)
        return Verified(grant)

    @method
    def mint(self, request: Mint, call: Incoming) -> Minted:
        own = call.origin.grant
        excess = rights.exceeds(request.grant, own)
        if excess:
            raise AccessDenied(f"beyond the rights you hold: {', '.join(excess)}", fields=excess)
        grant = msgspec.structs.replace(request.grant, chain=own.chain)
        token = tokens.mint(grant, self._root)
        self._record("mint", own.principal, grant, token.ids)
        self._remember(token.ids, grant.tenant)
        return Minted(token.text, token.ids)

    @method
    def revoke(self, request: RevokeToken, call: Incoming) -> Later:
        own = call.origin.grant
        id, whose = self._to_revoke(request)
        if not rights.acts_for(own, whose.tenant):
            raise AccessDenied("only a holder in the same tenant may revoke a token")
        self._revoked.add([id])
        self._record("revoke", own.principal, whose, [id])
        # The id is on disk, so no new connection gets the grant; now the kernel ends what runs under it.
        self.call("kernel.revoke", Revoke([id]), lambda a: _answer_revoked(call, a), timeout=KERNEL_SECONDS)
        return Later()

    @method
    def whoami(self, request: None, call: Incoming) -> Grant:
        return call.origin.grant

    @method
    def storage_key(self, request: StorageKeyQuery, call: Incoming) -> StorageKey:
        if not call.origin.grant.serves.startswith(DRIVER):
            raise AccessDenied("only a driver of this system may have the key of a tenant")
        return StorageKey(keys.tenant_key(self._master, request.tenant, request.purpose))

    def _to_revoke(self, request: RevokeToken) -> tuple[str, Grant]:
        """The revocation id that a request means, and the grant it was minted for."""
        if bool(request.token) == bool(request.id):
            raise InvalidArgument("give the token, or one of its revocation ids")
        if request.token:
            # The outermost block's id: what this token was attenuated from lives on.
            parsed = tokens.parse(request.token, self._root.public_key)
            return parsed.ids[-1], parsed.authority
        tenant = self._tenants.get(check_id(request.id))
        if tenant is None:
            raise NotFound("no token with this revocation id was minted or presented here: give the token")
        return request.id, Grant(principal="", tenant=tenant)

    def _remember(self, ids: list[str], tenant: str) -> None:
        for id in ids:
            self._tenants.setdefault(id, tenant)
        while len(self._tenants) > SEEN:
            del self._tenants[next(iter(self._tenants))]

    def _note_refusal(self, error: AccessDenied) -> None:
        # Bounded, so that presenting bad tokens does not fill the disk.
        self._refusals += 1
        if self._refusals <= REFUSALS_PER_SECOND:
            self._record("refuse", "", NOBODY, [], error.message)

    def _allow_refusals(self) -> None:
        if self._refusals > REFUSALS_PER_SECOND:
            more = f"{self._refusals - REFUSALS_PER_SECOND} more refused"
            self._record("refuse", "", NOBODY, [], more)
        self._refusals = 0

    def _record(self, kind: audit.Kind, by: str, about: Grant, ids: list[str], detail: str = "") -> None:
        names = {"tenant": about.tenant, "principal": about.principal}
        self._audit.append(Event(time=now(), kind=kind, by=by, ids=ids, detail=detail, **names))
        log.info("%s by %r: tenant %r, principal %r", kind, by, about.tenant, about.principal)


def _answer_revoked(call: Incoming, answer: Answer) -> None:
    if isinstance(answer.error, HostDown):
        # A kernel that died took all grants with it; its successor asks us about every token.
        call.reply(Revoked(0, 0))
    elif isinstance(answer.error, LLMOSError):
        call.fail(answer.error)
    else:
        call.reply(codec.decode(answer.body, Revoked))
