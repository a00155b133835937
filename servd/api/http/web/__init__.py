"""The playground and the API's pages: plain HTML, CSS and ES modules, served as they are by `servd.api.http.assets`."""
