"""What routes and middleware share about HTTP: reading requests, problems, headers, limits, the document.

No routes here, and no statements.
"""
