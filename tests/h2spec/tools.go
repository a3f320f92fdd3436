//go:build tools

// Package tools pins h2spec, which says nowhere what it needs itself, for Go 1.19 and later. Here, with any
// directory of PATH in the place of DIR:
//
//	go build -o DIR/h2spec github.com/summerwind/h2spec/cmd/h2spec
package tools

import _ "github.com/summerwind/h2spec/cmd/h2spec"
