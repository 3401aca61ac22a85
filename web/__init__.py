"""HTTP code that routes and middleware share: reading requests, problems, headers, limits, the document.

No routes here, and no statements.
"""
