"""The page: static files that the control plane serves at `/`, and the headers that keep a browser from doing more with them than it must."""
