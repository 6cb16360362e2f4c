"""What happens to latency and throughput when more adapters are asked for than the device memory for adapters holds."""
