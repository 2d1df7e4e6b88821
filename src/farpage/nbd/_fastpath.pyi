from farpage.nbd.fastpath import FastPath as FastPath
