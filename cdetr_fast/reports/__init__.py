"""Reports: self-contained HTML pages with charts and pictures, for a browser without a server."""
