"""Whether the page's numbers are those of the latency benchmark."""
