"""Authentication: tokens, the issuer's keys, passwords, local accounts.

`middleware/auth.py` compares the caller with the user in the path.
"""
