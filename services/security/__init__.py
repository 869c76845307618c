"""Security: mints, verifies, attenuates and revokes capabilities. The whole is described in docs/security.md.

messages.py     the link
boot.toml       the rights of every process that the supervisor starts
rights.py       whether a child's rights lie within its parent's
tokens.py       a grant as a Biscuit token and back; attenuation, which needs no server
narrowing.py    what is left of a grant under the checks that holders appended
blocks.py       which appended blocks are evaluated at all, and what constants stand in them
rootkey.py      the key that signs every token
revocations.py  the revocation ids that no longer count
audit.py        the hash-chained audit log
keys.py         a key for each tenant, and sealed bytes for what leaves RAM
server.py       the message handlers
"""
