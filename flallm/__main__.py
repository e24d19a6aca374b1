from flallm.cli import main

main()
