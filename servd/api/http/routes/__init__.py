"""One file an endpoint, each with its `ROUTES`; found by `servd.api.http.app.discover_routes`."""
