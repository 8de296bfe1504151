"""What is fastest and right on this machine: built, proven, measured, and chosen."""
