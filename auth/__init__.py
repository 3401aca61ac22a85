"""Who a caller is: tokens, the issuer's keys, passwords, local accounts.

Comparing a caller with a path is `middleware/auth.py`.
"""
