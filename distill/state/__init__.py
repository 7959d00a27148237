"""What outlives the process: checkpoints, their family tree, the moving average."""
